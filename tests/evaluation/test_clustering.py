"""Purity, NMI and class scores by hand, and runs of ViT-SOM: trained, evaluated, reported, tokenised, exported."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline.evaluation import evaluate
from pipeline.evaluation.clustering import (
    LabelCounts,
    classification_scores,
    normalised_mutual_information,
    purity,
)
from pipeline.evaluation.metrics import open_split, ordered_batches
from pipeline.evaluation.report import write_report
from pipeline.training.run_folder import Run
from tests.conftest import train

SMALL = [
    "batch.micro_batches=2",
    "batch.samples=8",
    "data.image_size=32",
    "model.image_size=32",
    "model.patch=8",
    "quantizer.codes=12",
    "quantizer.grid=[4,3]",
    "schedule.warmup_steps=1",
]


def test_counts_of_labels_leave_out_images_without_one() -> None:
    counts = LabelCounts()
    counts.add(torch.tensor([0, 2, 2]), torch.tensor([1, -1, 0]))
    counts.add(torch.tensor([2, 0]), torch.tensor([2, 1]))
    assert counts.table(4).tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]
    without = LabelCounts()
    without.add(torch.tensor([0, 1]), torch.tensor([-1, -1]))
    assert without.table(3).shape == (3, 0)


def test_purity_by_hand() -> None:
    """Of 10 images 4, 2 and 1 have the most frequent label of their code."""
    assert purity(torch.tensor([[4, 1, 0], [0, 0, 2], [1, 1, 1]])) == pytest.approx(0.7)


def test_nmi_by_hand() -> None:
    """scikit-learn's own example of unequal partitions, and the extremes."""
    assert normalised_mutual_information(torch.tensor([[3, 0], [0, 5]])) == pytest.approx(1)
    assert normalised_mutual_information(torch.tensor([[1, 1], [1, 1]])) == pytest.approx(0)
    # codes (½, ½), labels (¾, ¼): I = H(label) − ½·ln 2, over the mean of ln 2 and H(label)
    labels = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    expected = (labels - 0.5 * math.log(2)) / ((math.log(2) + labels) / 2)
    assert normalised_mutual_information(torch.tensor([[1, 1], [2, 0]])) == pytest.approx(expected)
    # a code for each of four images of two labels: I = ln 2, over the mean of ln 4 and ln 2
    assert normalised_mutual_information(torch.tensor([[1, 0], [1, 0], [0, 1], [0, 1]])) == pytest.approx(2 / 3)
    assert normalised_mutual_information(torch.tensor([[5], [0]])) == 1


def test_class_scores_by_hand() -> None:
    """Rows are predictions: class 2 is never one, class 3 never a label."""
    scores = classification_scores(torch.tensor([[3, 1, 0], [1, 2, 2], [0, 0, 0], [0, 1, 0]]))
    assert scores["class_accuracy"] == pytest.approx(0.5)
    assert scores["macro_precision"] == pytest.approx((3 / 4 + 2 / 5 + 0) / 3)
    assert scores["macro_recall"] == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert scores["macro_f1"] == pytest.approx((6 / 8 + 4 / 9 + 0 + 0) / 4)
    assert classification_scores(torch.zeros(3, 0)) == {}


@pytest.fixture(scope="module")
def map_run(image_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a small ViT-SOM on photographs, whose classes are the photographs that they were cut from."""
    run = tmp_path_factory.mktemp("runs") / "map"
    return train("vit_som_fashion_mnist", image_dataset, run, 4, *SMALL, "quantizer.topology=hexagonal")


@pytest.fixture(scope="module")
def class_run(image_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "classes"
    small = ["model.width=24", "model.depth=2", "model.classes=14", "data.resize=32"]
    return train("vit_som_cifar10", image_dataset, run, 2, *SMALL, *small)


def test_metrics_of_a_map_are_those_of_the_whole_split(map_run: Path) -> None:
    metrics = evaluate(map_run)
    model, recipe = Run(map_run).load_model()
    dataset = open_split(recipe)
    batches = list(ordered_batches(recipe, dataset))
    pixels, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("pixels", "labels"))
    grey = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    found = model.infer(pixels)
    assert metrics["samples"] == len(dataset) == len(pixels)
    assert metrics["mse"] == pytest.approx(float((found.reconstruction - grey).square().mean()), rel=1e-4)
    distances = 1 - torch.nn.functional.normalize(found.latents) @ model.quantizer.codebook()[0].T
    codes = distances.argmin(dim=1)
    assert metrics["code_counts"] == [codes.bincount(minlength=12).tolist()]
    assert metrics["map_distance"] == pytest.approx(float(distances.min(dim=1).values.mean()), rel=1e-4)
    best = [int(labels[codes == code].bincount().max()) for code in codes.unique()]
    assert metrics["purity"] == pytest.approx(sum(best) / len(labels))
    assert 0 <= metrics["nmi"] <= 1
    assert sum(map(sum, metrics["label_counts"])) == len(labels)
    assert 0 <= metrics["topographic_error"] <= 1
    assert metrics["codebook_usage"] == pytest.approx(len(best) / 12)
    assert json.loads((map_run / "metrics.json").read_text())["purity"] == metrics["purity"]


def test_metrics_of_a_classifier_and_its_map(class_run: Path) -> None:
    metrics = evaluate(class_run)
    model, recipe = Run(class_run).load_model()
    right = sum(
        int((model.infer(batch.pixels).logits.argmax(dim=1) == batch.labels).sum())
        for batch in ordered_batches(recipe, open_split(recipe))
    )
    assert metrics["class_accuracy"] == pytest.approx(right / metrics["samples"])
    assert {"macro_f1", "macro_precision", "macro_recall", "purity", "nmi", "map_distance"} <= metrics.keys()
    assert "psnr" not in metrics


def test_the_report_shows_the_map(map_run: Path, class_run: Path, tmp_path: Path) -> None:
    page = write_report([map_run, class_run], tmp_path / "report.html").read_text()
    for words in (
        "Label map",
        "U-matrix",
        "How many images a unit is nearest to",
        "Each prototype as the decoder shows it",
        "half a place to the right",
        "purity",
        "Map of vit_som_fashion_mnist: 4 × 3 units",
        "Map of vit_som_cifar10: 4 × 3 units",
        "reconstruction by vit_som_fashion_mnist",
    ):
        assert words in page, words
    assert "reconstruction by vit_som_cifar10" not in page


def test_each_image_is_one_token(map_run: Path, image_dataset: Path, ray_cluster, tmp_path: Path) -> None:
    from pipeline.export import decode, export, load_quantizer, tokenize

    summary = tokenize(map_run, image_dataset, tmp_path / "tokens")
    assert summary.tokens == summary.samples == 280
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["latent_grid"] == [1, 1]
    assert decode(map_run, tmp_path / "tokens", tmp_path / "pictures").images == 280
    export(map_run, tmp_path / "weights", format="safetensors")
    quantizer = load_quantizer(tmp_path / "weights")
    assert torch.equal(quantizer.codebook(), Run(map_run).load_model()[0].quantizer.codebook())


def test_plans_of_maps_and_heads(capsys: pytest.CaptureFixture[str]) -> None:
    from launch.plan import print_plan

    for recipe in ("vit_som_usps", "vit_som_cifar10"):
        print_plan(recipe, ["batch.samples=2", "batch.micro_batches=1"], 1, device="cpu")
    assert "som, 1 × 16 codes" in capsys.readouterr().out
