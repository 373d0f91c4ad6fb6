"""Fixtures of all tests: the bundled sample, and the data sets that Ray prepares of it once a session."""

from __future__ import annotations

import os
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
def image_dataset(
    ray_cluster: dict[str, float], image_source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The image sample, prepared: splits train (251 tiles) and validation (29). Read only; copy it to damage it."""
    from data_prep import prepare

    out = tmp_path_factory.mktemp("prepared") / "images"
    prepare("image", image_source, out, shard_bytes=IMAGE_SHARD_BYTES, progress=lambda _: None)
    return out
