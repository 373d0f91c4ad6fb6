"""Distances by networks, as `evaluate` gives them: what is measured with which files, and told."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from launch.cli import app
from pipeline.evaluation import evaluate
from pipeline.evaluation.distances import ImageDistances, NetworkFiles
from pipeline.evaluation.metrics import read_metrics
from pipeline.models.published import WeightsError
from tests.evaluation.test_inception import save_inception
from tests.models.test_lpips import save_backbone


def test_without_files_there_is_the_untrained_network(image_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(image_run, tmp_path / "run")
    metrics = evaluate(run)
    assert metrics["rfd_random"] > 0
    assert not {"rfid", "rfid_torchvision", "lpips", "networks"} & metrics.keys()


def test_given_networks_are_named_by_their_hashes(image_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(image_run, tmp_path / "run")
    inception, backbone = tmp_path / "inception.pth", save_backbone(tmp_path / "alexnet.pth")
    save_inception(inception, 1008)
    metrics = evaluate(run, batches=1, files=NetworkFiles(inception, backbone))
    assert metrics["rfid"] > 0
    assert metrics["lpips"] > 0
    assert metrics["rfd_random"] > 0
    for name, file in (("inception", inception), (backbone.stem, backbone)):
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        assert metrics["networks"][name] == {"file": str(file), "sha256": sha256}
    assert json.loads((run / "metrics.json").read_text()) == metrics
    done = CliRunner().invoke(app, ["evaluate", str(run), "--lpips-weights", str(backbone)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert f"{backbone}, sha256 {hashlib.sha256(backbone.read_bytes()).hexdigest()}" in done.output.replace("\n", "")
    assert "LPIPS" in done.output
    assert "rFID of the evaluation before dropped, measured on 8 samples, not 29" in done.output
    assert "rfid" not in json.loads((run / "metrics.json").read_text())


def test_a_plain_evaluation_keeps_distances_of_its_checkpoint(image_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(image_run, tmp_path / "run")
    backbone = save_backbone(tmp_path / "alexnet.pth")
    with_lpips = evaluate(run, files=NetworkFiles(lpips=backbone))
    assert with_lpips["lpips"] > 0
    plain = evaluate(run)
    assert plain == with_lpips == read_metrics(run)
    other = evaluate(run, split="train")
    assert not {"lpips", "networks"} & other.keys()


def test_distances_of_small_images_and_few(tmp_path: Path) -> None:
    distances = ImageDistances(NetworkFiles(lpips=save_backbone(tmp_path / "alexnet.pth")), "cpu")
    distances.add(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8))
    values = distances.compute()
    assert values["lpips"] is None
    assert values["rfd_random"] is None


def test_files_that_mean_nothing_are_refused(image_run: Path, speech_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds a model of speech data: networks"):
        evaluate(speech_run, files=NetworkFiles(inception=tmp_path / "inception.pth"))
    with pytest.raises(WeightsError, match=r"inception\.pth: there is no such file"):
        evaluate(image_run, files=NetworkFiles(inception=tmp_path / "inception.pth"))
    with pytest.raises(ValueError, match="give the network too, with --lpips-weights"):
        ImageDistances(NetworkFiles(lpips_heads=tmp_path / "heads.pth"), "cpu")
