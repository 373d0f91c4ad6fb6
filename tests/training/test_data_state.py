"""The data state of a checkpoint: a resume reads on where it was, also elsewhere; changed data is refused, saying what
changed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.data import read_manifest
from pipeline.data.manifest import SplitEntry, write_manifest
from pipeline.training.checkpoint import read_manifest as read_checkpoint
from pipeline.training.run_folder import Run
from tests.conftest import IMAGE


def resume(run: Path, *data: str) -> subprocess.CompletedProcess[str]:
    """Train a step more, in a process of its own."""
    overrides = [*IMAGE, "training.steps=5", "training.log_every=1", "training.checkpoint_every=4", *data]
    command = [sys.executable, "-m", "pipeline.training", "image/autoencoder_tiny_ksom", *overrides, "--run", str(run)]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )


def drop_a_shard(folder: Path) -> None:
    manifest = read_manifest(folder)
    train = SplitEntry.of(manifest.splits["train"].shards[:-1])
    write_manifest(folder, manifest.model_copy(update={"splits": manifest.splits | {"train": train}}))


@pytest.fixture
def run(image_run: Path, tmp_path: Path) -> Path:
    """A run of four steps that may be gone on with."""
    shutil.copytree(image_run, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_says_what_it_was_trained_on(run: Path, image_dataset: Path) -> None:
    manifest = read_checkpoint(Run(run).list_checkpoints()[-1])
    assert manifest.data["data.samples"] == 251
    assert manifest.data["data.content"] == read_manifest(image_dataset).fingerprint("train")
    assert manifest.data["batch.samples"] == 8


def test_a_data_set_may_move(run: Path, image_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(image_dataset, tmp_path / "moved")
    done = resume(run, f"data.path={tmp_path / 'moved'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in Run(run).log()] == [1, 2, 3, 4, 5]


def test_a_changed_data_set_is_refused_saying_what_changed(run: Path, image_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(image_dataset, tmp_path / "changed")
    drop_a_shard(tmp_path / "changed")
    shards = read_manifest(image_dataset).splits["train"].shards
    done = resume(run, f"data.path={tmp_path / 'changed'}")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "was trained on other data than the recipe reads now:" in said
    assert f"  data.samples 251 → {251 - shards[-1].samples}\n" in said
    assert f"  data.shards {len(shards)} → {len(shards) - 1}\n" in said
    assert "seed" not in said, "what is as it was is not told"
    assert "data.content" in said
    assert "start a new --run" in said
    assert len(Run(run).log()) == 4, "no step was taken"


@pytest.mark.slow
def test_a_mixture_instead_of_a_data_set_is_refused(run: Path, image_dataset: Path) -> None:
    """The recipe's check passes data.mix, as data sets may move; the data state's does not."""
    both = [{"path": str(image_dataset)}, {"path": str(image_dataset), "split": "validation", "weight": 0.5}]
    done = resume(run, f"data.mix={json.dumps(both)}")
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "  data.samples 251 → none" in said
    assert "  data.mix.1.weight none → 0.5" in said
