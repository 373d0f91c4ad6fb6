"""The image recipes: the published sizes and settings, and a variant for each quantizer by one override."""

import pytest
import torch

from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.models import build_model
from pipeline.models.batch_norm import NormSync
from pipeline.quantizers import Quantizer
from pipeline.quantizers.registry import KINDS
from pipeline.training.optimizer import build_optimizer
from recipes.schema import load_recipe
from tests.training.engine_steps import image_batch

SIZES = {
    "vqvae_cifar10": 662_083,
    "sqvae_cifar10": 307_715,
    "sqvae_celeba128": 637_443,
    "vqvae2_imagenet256": 1_388_867,
    "vqgan_imagenet256_f16": 71_752_331,
    "vqgan_imagenet256_f8": 69_978_763,
}
"""Weights of encoder and decoder; those of the KSOM paper's two nets are what its code has,
those of VQGAN's without the convolutions of one pixel what VQGAN's code has."""
TINY = {
    "vqvae_cifar10": {"model.channels": 16, "model.residual_channels": 8, "model.latent_dim": 8},
    "sqvae_cifar10": {"model.latent_dim": 8},
    "sqvae_celeba128": {"model.latent_dim": 8, "model.residual_layers": 1},
    "vqvae2_imagenet256": {"model.channels": 16, "model.residual_channels": 8, "model.latent_dim": 8},
    "vqgan_imagenet256_f16": {"model.channels": 32, "model.multipliers": [1, 1, 1], "model.residual_layers": 1},
    "vqgan_imagenet256_f8": {"model.channels": 32, "model.multipliers": [1, 1, 1], "model.residual_layers": 1},
}
CODES = 16
DISCRETE = [kind for kind in KINDS if kind != "som"]
"""A som stands beside a model and leaves latents as they are."""


def on_meta(recipe):
    with torch.device("meta"):
        return build_model(recipe.model, recipe.quantizer)


def tiny(name, kind):
    """The recipe with a small net, 16 codes and images of 32 pixels."""
    overrides = {"quantizer.kind": kind, "data.image_size": 32, **TINY[name]}
    if kind == "fsq":
        overrides |= {"quantizer.levels": [4, 4], "quantizer.codes": CODES}
    elif kind != "identity":
        overrides["quantizer.codes"] = CODES
    if "grid" in KINDS[kind][0].model_fields:
        overrides["quantizer.grid"] = [4, 4]
    return load_recipe(f"image/{name}", overrides)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    model = on_meta(load_recipe(f"image/{name}", {"quantizer.kind": "identity"}))
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name]


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", DISCRETE)
def test_one_override_is_another_quantizer(name, kind):
    """Of about the recipe's codes, whatever the recipe's own kind; the net and its training stay."""
    recipe, own = load_recipe(f"image/{name}", {"quantizer.kind": kind}), load_recipe(f"image/{name}")
    assert recipe.quantizer.kind == kind
    changed = {"quantizer", "codebooks"}
    assert recipe.model_dump(exclude=changed) == own.model_dump(exclude=changed)
    if kind not in ("identity", "residual"):
        assert own.quantizer.codes * 0.9 < recipe.quantizer.codes <= own.quantizer.codes
        assert recipe.quantizer.groups == 1
    assert {module.config.kind for module in on_meta(recipe).modules() if isinstance(module, Quantizer)} >= {kind}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", DISCRETE)
def test_every_kind_trains(name, kind):
    """A step as the loop takes it; then codes give what the quantizer's own vectors give."""
    recipe = tiny(name, kind)
    torch.manual_seed(0)
    model = build_model(recipe.model, recipe.quantizer).train()
    batch = image_batch(torch.rand(4, 3, 32, 32))
    if recipe.codebooks.initialise == "kmeans":
        initialise_codebooks(model, [batch])
    optimizer = build_optimizer(model, recipe.optimizer)
    sync, norms = CodebookSync(model, optimizer=optimizer), NormSync(model)
    output = model(batch)
    (torch.stack(list(output.losses.values())).sum() / batch.targets).backward()
    first, *_, last = model.parameters()
    assert torch.isfinite(first.grad).all()
    assert first.grad.any(), "the gradient goes through the quantizer"
    assert last.grad.any()
    optimizer.step()
    sync.step()
    norms.step()
    for quantizer in sync.quantizers.values():
        assert torch.isfinite(quantizer.codebook()).all()
    reconstruction, codes = model.eval().reconstruct(batch.pixels)
    assert torch.isfinite(reconstruction).all()
    if kind != "identity":
        torch.testing.assert_close(model.decode_codes(codes), reconstruction)
        torch.testing.assert_close(model.encode_codes(batch)[0], codes, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "rate", "images"), [("vqvae_cifar10", 1e-3, 256), ("vqvae2_imagenet256", 3e-4, 128)])
def test_the_ksom_papers_training(name, rate, images):
    """Irie et al.'s code, main.py and sweeps/kohonen."""
    recipe = load_recipe(f"image/{name}")
    quantizer, optimizer = recipe.quantizer, recipe.optimizer
    assert (quantizer.codes, quantizer.decay, quantizer.count_init, quantizer.commitment) == (512, 0.99, 1.0, 0.25)
    assert (optimizer.learning_rate, optimizer.betas, optimizer.epsilon) == (rate, (0.9, 0.999), 1e-8)
    assert optimizer.weight_decay == 0
    assert recipe.schedule.kind == "constant"
    assert recipe.batch.micro_batches * recipe.batch.samples == images
    assert (recipe.training.steps, recipe.engine.gradient_clipping) == (30_000, 1.0)
    assert not recipe.data.flip


@pytest.mark.parametrize(("name", "images"), [("sqvae_cifar10", 50_000), ("sqvae_celeba128", 162_770)])
def test_the_training_of_huh_et_al(name, images):
    recipe = load_recipe(f"image/{name}")
    optimizer = recipe.optimizer
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.95), 1e-4)
    epoch = -(-images // (recipe.batch.micro_batches * recipe.batch.samples))
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps, recipe.training.steps) == (
        "cosine",
        10 * epoch,
        90 * epoch,
    )
    assert recipe.quantizer.codes == 1024
