"""`tessera launch` checks what it can before anything starts, and hands the rest to the right program."""

from pathlib import Path

import pytest
import yaml

from launch.start import Launch, start, start_locally
from tests.conftest import SMALL_IMAGE

IMAGE = "image/autoencoder_tiny_ksom"


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """`start` with the command line's defaults, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    defaults = {"nodes": 1, "ranks_per_node": 1, "gpus": True, "failures": 0, "ray_address": None, "hostfile": None}
    defaults |= {"image": "lab/tessera:1", "time_limit": "24:00:00", "sbatch_options": [], "dry_run": True}

    def call(backend, *overrides, run, **other):
        asked = {"backend": backend, "recipe_name": IMAGE, "overrides": overrides, "run": Path(run)}
        return start(Launch(**(asked | defaults | other)))

    return call


def test_kubernetes_looks_for_nothing_here(launch, capsys):
    """Neither data nor run folder: the pods' volume may not be on this machine."""
    assert launch("kubernetes", "data.path=/volume/photos", run="/volume/runs/a", gpus=False) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert "--run /volume/runs/a" in manifest["spec"]["entrypoint"]
    [container] = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/volume"}]
    assert launch("kubernetes", "data.path=s3://bucket/photos", run="/volume/runs/a") == 0
    assert "mountPath: /volume/runs\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="photos is relative"):
        launch("kubernetes", "data.path=photos", run="/volume/runs/a")
    with pytest.raises(ValueError, match="can't be shared by 7 ranks"):
        launch("kubernetes", "data.path=/volume/photos", run="/volume/runs/a", nodes=7)


def test_a_dry_run_makes_nothing_and_says_what_would_be_done(launch, image_dataset, capsys, tmp_path):
    assert launch("slurm", f"data.path={image_dataset}", run="a run") == 0
    told = capsys.readouterr().out
    assert told.startswith("#!/bin/bash\n")
    assert f'#SBATCH --output="{tmp_path}/a run/slurm-%j.log"' in told, "wherever it is submitted"
    assert told.endswith(f"# tessera launch gives this file to: mkdir -p '{tmp_path}/a run' && sbatch\n")
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named(launch, image_dataset, monkeypatch, tmp_path):
    data = f"data.path={image_dataset}"
    hosts = tmp_path / "hosts"
    hosts.write_text("here slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="sbatch is not on this machine"):
        launch("slurm", data, run="run", dry_run=False)
    with pytest.raises(ValueError, match="pdsh is not on this machine"):
        launch("hostfile", data, run="run", hostfile=hosts, dry_run=False)
    assert list(tmp_path.iterdir()) == [hosts]
    with pytest.raises(ValueError, match="--no-gpus with --on local"):
        launch("local", data, run="run", gpus=False)
    with pytest.raises(ValueError, match="--nodes 2 with --on local"):
        launch("local", data, run="run", nodes=2)


@pytest.mark.slow
def test_a_finished_run_is_told_from_one_that_trained(image_dataset, capsys, tmp_path):
    overrides = [f"data.path={image_dataset}", *SMALL_IMAGE, "training.steps=2", "schedule.warmup_steps=1"]
    for told in ("trained into", "nothing is left to train"):
        assert start_locally(IMAGE, overrides, tmp_path / "run", 1) == 0
        assert told in capsys.readouterr().out
