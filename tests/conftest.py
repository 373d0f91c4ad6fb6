"""Fixtures of all tests: the bundled sample, the data sets that Ray prepares of it once a session, two short runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two cores: a process that also splits its own kernels over threads only waits for itself. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C, and every process that they start would too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SAMPLE = Path(__file__).parent / "data"
SPEECH_SHARD_BYTES = 1_000_000  # makes nine shards of training speech and four of images, to cross their borders
IMAGE_SHARD_BYTES = 400_000


@pytest.fixture(scope="session")
def speech_source() -> Path:
    """The bundled tree of real speech: 208 clips of five speakers, and three broken files."""
    return SAMPLE / "speech"


@pytest.fixture(scope="session")
def image_source() -> Path:
    """The bundled tree of real photographs: 280 tiles of 14 photographs, and three broken files."""
    return SAMPLE / "images"


@pytest.fixture(scope="session")
def aws_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file in which this process and Ray's workers look for the S3 server; empty until `s3` starts one."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    path = tmp_path_factory.mktemp("aws") / "config"
    path.touch()
    os.environ["AWS_CONFIG_FILE"] = str(path)
    return path


@pytest.fixture(scope="session")
def s3(aws_config: Path) -> Iterator[str]:
    """``s3://tessera``, an empty bucket of an S3 server on this machine."""
    import boto3

    process, endpoint = start_s3_server()
    try:
        keys = "aws_access_key_id = test\naws_secret_access_key = test\nregion = us-east-1\n"
        aws_config.write_text(f"[default]\n{keys}endpoint_url = {endpoint}\n")
        boto3.client("s3").create_bucket(Bucket="tessera")
        yield "s3://tessera"
    finally:
        process.kill()
        process.wait()


def start_s3_server() -> tuple[subprocess.Popen[str], str]:
    """An S3 server on a free port of this machine, in a process of its own; and its address."""
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"http://127\.0\.0\.1:\d+", line):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or the server would block on its log
            return process, match[0]
    raise RuntimeError(f"the S3 server ended with {process.wait()}")


@pytest.fixture(scope="session")
def ray_cluster(aws_config: Path) -> Iterator[dict[str, float]]:
    """A Ray on this machine, started once; preparation and tokenisation join it instead of starting their own."""
    from pipeline.ray_session import ray_session

    with ray_session() as resources:
        yield resources


@pytest.fixture(scope="session")
def speech_dataset(
    ray_cluster: dict[str, float], speech_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The speech sample, prepared: splits train (191 clips) and validation (17). Read only; copy it to damage it."""
    from data_prep import prepare

    out = tmp_path_factory.mktemp("prepared") / "speech"
    prepare("speech", speech_source, out, shard_bytes=SPEECH_SHARD_BYTES, progress=lambda _: None)
    return out


@pytest.fixture(scope="session")
def image_dataset(ray_cluster: dict[str, float], image_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image sample, prepared: splits train (251 tiles) and validation (29). Read only; copy it to damage it."""
    from data_prep import prepare

    out = tmp_path_factory.mktemp("prepared") / "images"
    prepare("image", image_source, out, shard_bytes=IMAGE_SHARD_BYTES, progress=lambda _: None)
    return out


IMAGE = [
    "batch.micro_batches=2",
    "batch.samples=8",
    "data.image_size=32",
    "quantizer.codes=12",
    "quantizer.grid=[4,3]",
    "model.channels=16",
    "model.residual_channels=8",
    "schedule.warmup_steps=1",
]
SMALL_IMAGE = [
    "batch.samples=4",
    "data.image_size=32",
    "quantizer.codes=16",
    "quantizer.grid=[4,4]",
    "model.channels=16",
    "model.residual_channels=8",
    "training.log_every=1",
    "schedule.warmup_steps=2",
]
"""For runs of several ranks, that may be stopped, killed and compared."""
SPEECH = [
    "batch.micro_batches=2",
    "batch.seconds=6",
    "data.max_seconds=3",
    "schedule.warmup_steps=1",
]


def train(recipe: str, dataset: Path, run: Path, steps: int, *overrides: str) -> Path:
    """Train here, as the only rank, for a few steps; every step is logged."""
    common = [f"data.path={dataset}", f"training.steps={steps}", "training.log_every=1", "training.checkpoint_every=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "pipeline.training", recipe, *common, *overrides, "--run", str(run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return run


@pytest.fixture(scope="session")
def image_run(image_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a small Kohonen autoencoder."""
    run = tmp_path_factory.mktemp("runs") / "images"
    return train("image/autoencoder_tiny_ksom", image_dataset, run, 4, *IMAGE)


@pytest.fixture(scope="session")
def speech_run(speech_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of a small speech encoder."""
    run = tmp_path_factory.mktemp("runs") / "speech"
    return train("speech/wav2vec2_tiny", speech_dataset, run, 3, *SPEECH)
