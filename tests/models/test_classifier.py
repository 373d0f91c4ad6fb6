"""Classifiers with quantized features: torchvision's nets in two halves, any number of ranks, real photographs."""

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision import models

from pipeline.data import ShardedDataset
from pipeline.evaluation import evaluate, write_report
from pipeline.evaluation.metrics import ordered_batches
from pipeline.export import decode, export, load_quantizer, tokenize
from pipeline.models import build_model
from pipeline.models.classifier import accuracies
from pipeline.models.config import ClassifierConfig
from pipeline.quantizers.identity import IdentityConfig
from pipeline.quantizers.registry import KINDS
from pipeline.quantizers.ste import STEConfig
from pipeline.training.run_folder import Run
from recipes.schema import RecipeError, load_recipe
from tests.conftest import train
from tests.distributed.harness import run_ranks
from tests.export.test_tokens import stock_reader
from tests.training.engine_steps import (
    STEP_MICRO_BATCHES,
    assert_gradients,
    build,
    gradients,
    image_batch,
    micro_batch,
    take_all,
)

SMALL = {"architecture": "vit", "classes": 7, "patch": 4, "width": 8, "heads": 2, "depth": 2, "quantize_after": 1}
SIZES = {"resnet18": 11_227_812, "alexnet": 57_413_540, "vit_tiny": 5_505_892}
"""Weights for 100 classes, without codes; the first two are torchvision's own."""


def labelled(pixels, labels):
    return replace(image_batch(pixels), labels=torch.tensor(labels))


@pytest.mark.parametrize(("name", "side"), [("resnet18", 32), ("alexnet", 64)])
def test_both_halves_are_torchvisions_net(name, side):
    """With nothing between them, and the same weights in the order in which they come."""
    theirs = getattr(models, name)(num_classes=7)
    ours = build_model(ClassifierConfig(architecture=name, classes=7, dropout=0.0 if name == "alexnet" else None),
                       IdentityConfig())  # fmt: skip
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine.data.copy_(other.data)
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    pixels, labels = torch.rand(3, 3, side, side), [0, 6, 2]
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    logits = theirs.train()((pixels - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(labels))
    batch = labelled(pixels, labels)
    found = ours.train()(batch).losses["classification"] / batch.targets
    # Kernels for channels last add in another order, and norms of three values make more of it.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_published_recipes(name):
    recipe = load_recipe(f"image/{name}_imagenet100", {"quantizer.kind": "identity"})
    with torch.device("meta"):
        model = build_model(recipe.model, recipe.quantizer)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]


@pytest.mark.parametrize(
    "name", ["resnet18_imagenet100", "alexnet_imagenet100", "vit_tiny_imagenet100", "classifier_tiny"]
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "som"])
def test_one_override_is_another_quantizer(name, kind):
    recipe, own = load_recipe(f"image/{name}", {"quantizer.kind": kind}), load_recipe(f"image/{name}")
    assert recipe.model == own.model
    if kind not in ("identity", "residual"):
        assert own.quantizer.codes * 0.9 < recipe.quantizer.codes <= own.quantizer.codes
    with torch.device("meta"):
        assert build_model(recipe.model, recipe.quantizer).quantizer.config.kind == kind


@pytest.mark.parametrize(
    ("options", "side", "grid"),
    [
        ({"architecture": "resnet18", "classes": 7}, 40, (5, 5)),
        ({"architecture": "alexnet", "classes": 7}, 72, (1, 1)),
        ({"architecture": "alexnet", "classes": 7}, 99, (2, 2)),
        (SMALL, 16, (1, 17)),
    ],
)
def test_codes_lie_on_a_grid_and_a_transformers_in_a_row(options, side, grid):
    model = build_model(ClassifierConfig(**options), STEConfig(codes=16)).eval()
    codes, tokens = model.encode_codes(labelled(torch.rand(2, 3, side, side), [0, 1]))
    assert codes.shape == (2, *grid, 1)
    assert tokens.tolist() == [grid[0] * grid[1]] * 2


def test_nothing_goes_around_the_quantizer():
    """With one code for all tokens, all images are one."""
    model = build_model(ClassifierConfig(**SMALL), STEConfig(codes=2)).eval()
    model.quantizer.set_codebook(torch.full((1, 2, 8), 0.3), torch.ones(1, 2))
    logits = model.classify(torch.rand(4, 3, 16, 16))
    torch.testing.assert_close(logits, logits[:1].expand(4, -1))


def test_a_whole_number_of_patches_is_wanted():
    model = build_model(ClassifierConfig(**SMALL), STEConfig(codes=2))
    with pytest.raises(ValueError, match="18 × 18 are no whole square of patches of 4"):
        model(labelled(torch.rand(1, 3, 18, 18), [0]))


def test_accuracies_by_hand():
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5], [5.0, 4, 3, 2, 1, 0], [0.0, 1, 2, 3, 4, 5]])
    found = accuracies(logits, torch.tensor([5, 4, 0]))
    assert {name: (float(right), float(number)) for name, (right, number) in found.items()} == {
        "class_accuracy": (1, 3),
        "class_accuracy_top5": (2, 3),
    }
    assert list(accuracies(logits[:, :3], torch.tensor([0, 0, 0]))) == ["class_accuracy"]


@pytest.mark.parametrize(
    ("label", "message"),
    [(-1, "has no label: .* a folder for each class"), (7, "of class 7, .*model.classes=8 or more")],
)
def test_an_image_without_a_class_is_named(label, message):
    model = build("classifier")
    with pytest.raises(ValueError, match=rf"image-1 .*{message}"):
        model(labelled(torch.rand(2, 3, 16, 16), [3, label]))


def test_data_without_that_many_classes_are_refused(image_dataset):
    recipe = load_recipe("image/classifier_tiny", {"data.path": str(image_dataset)})
    with pytest.raises(RecipeError, match=r"has 14 classes, model.classes=10: use"):
        recipe.check_data()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet18", "patch": 8}, "patch=8 means nothing for architecture=resnet18"),
        ({"architecture": "vit", "dropout": 0.5}, "dropout=0.5 means nothing for architecture=vit"),
        ({"architecture": "vit", "heads": 5}, "heads=5 can't share width=192"),
        (
            {"architecture": "vit", "quantize_after": 12},
            "leaves none of depth=12 behind the quantizer: use 11 or fewer",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(RecipeError) as refused:
        load_recipe("image/vit_tiny_imagenet100", {f"model.{name}": value for name, value in options.items()})
    assert message in str(refused.value)


@functools.cache
def engine_runs(ranks):
    cases = [("classifier", {"zero_stage": stage, "gradient_clipping": 0}, 1, {}) for stage in (1, 3)]
    return run_ranks(take_all, ranks, cases, timeout=280)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("place", [0, 1])
def test_gradients_are_those_of_one_process_on_the_joint_batch(ranks, place):
    model = build("classifier")
    parts = [micro_batch("classifier", 0, number) for number in range(STEP_MICRO_BATCHES)]
    batch = replace(
        image_batch(torch.cat([part.pixels for part in parts])), labels=torch.cat([part.labels for part in parts])
    )
    (sum(model(batch).losses.values()) / batch.targets).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_gradients(gradients([rank[place] for rank in engine_runs(ranks)]), expected)


def test_a_run_on_photographs_is_measured_shown_and_exported(image_dataset, tmp_path):
    """Tiles of 14 photographs, the class being the photograph; with SGD, a step schedule and averaged weights."""
    run = train(
        "image/classifier_tiny",
        image_dataset,
        tmp_path / "run",
        6,
        "model.classes=14",
        "data.image_size=32",
        "optimizer.kind=sgd",
        "optimizer.betas=[0.9,0.95]",
        "optimizer.momentum=0.9",
        "optimizer.learning_rate=0.05",
        "schedule={kind: step, milestones: [4], factor: 0.1}",
        "training.weight_ema=0.9",
        "batch.micro_batches=2",
    )
    log = Run(run).log()
    assert {"class_accuracy", "class_accuracy_top5", "loss_classification"} <= log[-1].keys()
    assert [line["learning_rate"] for line in log] == pytest.approx([0.05] * 4 + [0.005] * 2)
    raw, averaged = evaluate(run, raw=True), evaluate(run)
    assert (raw["weights"], averaged["weights"]) == ("trained", "averaged")
    assert raw["latent_dimension"] is not None
    assert 0 <= averaged["class_accuracy"] <= averaged["class_accuracy_top5"] <= 1
    assert json.loads((run / "metrics.json").read_text())["weights"] == "averaged"
    assert "top-5 accuracy" in write_report(run, tmp_path / "report.html").read_text()
    out = export(run, tmp_path / "export", "safetensors")
    assert load_quantizer(out).codes == 64
    tokens = tokenize(run, image_dataset, tmp_path / "tokens")
    assert tokens.tokens == 280 * 65
    assert json.loads((tokens.out / "manifest.json").read_text())["latent_grid"] == [1, 65]
    model, recipe = Run(run).load_model()
    batch = next(ordered_batches(recipe, ShardedDataset(image_dataset, "validation")))
    stored = stock_reader(tokens.out, "validation")
    for key, codes in zip(batch.keys, model.encode_codes(batch)[0], strict=True):
        assert np.array_equal(stored[key]["npy"], codes.numpy())
    with pytest.raises(ValueError, match=r"name classes, with model\.kind=classifier, and has no decoder"):
        decode(run, tokens.out, tmp_path / "images")


@pytest.mark.slow
def test_photographs_are_told_apart(image_dataset, tmp_path):
    """Chance is 1 in 14."""
    run = train("image/classifier_tiny", image_dataset, tmp_path / "run", 150, "model.classes=14", "data.image_size=32")
    metrics = evaluate(run, split="train")
    assert metrics["class_accuracy"] > 0.3  # 45 % when this was written
    assert metrics["codebook_usage"] > 0.1
