"""Fixtures of all tests: the bundled sample, the data sets that Ray prepares of it once a session, two short runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two cores: a process that also splits its own kernels over threads only waits for itself. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
def ray_cluster() -> Iterator[dict[str, float]]:
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
    return train("speech/wav2vec2_tiny_knn", speech_dataset, run, 3, *SPEECH)
