"""Two short real trainings that evaluation and report look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
