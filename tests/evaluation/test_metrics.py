"""`evaluate` on real runs, against what the model gives when it is asked directly."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipeline.evaluation import evaluate, metrics_table
from pipeline.evaluation.metrics import open_split, ordered_batches, write_metrics
from pipeline.training.run_folder import Run


@pytest.fixture(scope="module")
def image_metrics(image_run: Path) -> dict[str, object]:
    return evaluate(image_run)


@pytest.fixture(scope="module")
def speech_metrics(speech_run: Path) -> dict[str, object]:
    return evaluate(speech_run)


def test_image_metrics_are_those_of_the_whole_split(image_run: Path, image_metrics: dict[str, object]) -> None:
    model, recipe = Run(image_run).load_model()
    dataset = open_split(recipe)
    assert dataset.split == "validation"
    pixels = torch.cat([batch.pixels for batch in ordered_batches(recipe, dataset)])
    assert len(pixels) == len(dataset) == image_metrics["samples"]
    with torch.no_grad():
        reconstruction, codes = model.reconstruct(pixels)
    error = float((reconstruction.clamp(0, 1) - pixels).square().mean())
    assert image_metrics["mse"] == pytest.approx(error, rel=1e-4)
    assert image_metrics["psnr"] == pytest.approx(-10 * math.log10(error), rel=1e-4)
    counts = codes.flatten().bincount(minlength=12)
    assert image_metrics["code_counts"] == [counts.tolist()]
    assert image_metrics["tokens"] == codes.numel()
    assert image_metrics["codebook_usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert 0 <= image_metrics["topographic_error"] <= 1
    assert -1 <= image_metrics["grid_correlation"] <= 1
    assert image_metrics["step"] == 4
    assert image_metrics["complete"]


def test_speech_metrics_are_ratios_of_sums(speech_run: Path, speech_metrics: dict[str, object]) -> None:
    model, recipe = Run(speech_run).load_model()
    loss = right = weight = targets = clips = 0.0
    with torch.no_grad():
        for batch in ordered_batches(recipe, open_split(recipe)):
            output = model(batch)
            loss += float(output.losses["contrastive"])  # targets without a valid distractor add nothing
            right += float(output.metrics["accuracy"][0])
            weight += float(output.metrics["accuracy"][1])
            targets += batch.targets
            clips += len(batch.keys)
    assert speech_metrics["contrastive_loss"] == pytest.approx(loss / weight, rel=1e-4)
    assert speech_metrics["accuracy"] == pytest.approx(right / weight, rel=1e-4)
    assert speech_metrics["targets"] == targets
    assert speech_metrics["samples"] == clips == len(open_split(recipe))
    assert speech_metrics["chance_loss"] == pytest.approx(math.log(recipe.model.masking.negatives + 1))
    assert 0 <= speech_metrics["valid_negatives"] <= 1
    assert all(sum(group) == speech_metrics["tokens"] for group in speech_metrics["code_counts"])


def test_the_file_holds_what_was_returned(image_run: Path, image_metrics: dict[str, object]) -> None:
    assert json.loads((image_run / "metrics.json").read_text()) == image_metrics
    assert not list(image_run.glob("*.partial"))


def test_a_quick_look_says_that_it_is_one(image_run: Path, image_metrics: dict[str, object]) -> None:
    quick = evaluate(image_run, batches=1, split="train")
    write_metrics(image_run / "metrics.json", image_metrics)
    assert quick["samples"] == 8
    assert quick["split"] == "train"
    assert not quick["complete"]


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    write_metrics(tmp_path / "metrics.json", {"psnr": math.inf, "grid_correlation": math.nan, "mse": 0.0})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"psnr": None, "grid_correlation": None, "mse": 0.0}


def test_the_table_names_run_and_metrics(image_metrics: dict[str, object]) -> None:
    console = Console(record=True, width=140)
    console.print(metrics_table({**image_metrics, "grid_correlation": None}))
    text = console.export_text()
    for word in ("ksom", "validation", "PSNR", "topographic error", f"{image_metrics['psnr']:.2f} dB", "–"):
        assert word in text


def test_data_that_can_not_be_evaluated_is_refused(image_run: Path, speech_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="speech data"):
        evaluate(image_run, data=speech_dataset)
    with pytest.raises(ValueError, match="no split 'test'"):
        evaluate(image_run, split="test")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        evaluate(tmp_path)
