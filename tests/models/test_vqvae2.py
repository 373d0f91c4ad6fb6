"""VQ-VAE-2: two levels that hang together, each counted."""

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.evaluation.distances import NetworkFiles
from pipeline.evaluation.image import measure_images
from pipeline.models import build_model
from pipeline.models.base import quantizers_of
from pipeline.models.config import VQVAE2Config
from pipeline.quantizers.knn_simplex import KNNSimplexConfig
from pipeline.quantizers.ksom import KSOMConfig
from pipeline.training.throughput import Throughput
from tests.training.engine_steps import image_batch


def tiny(quantizer=None):
    torch.manual_seed(0)
    config = VQVAE2Config(channels=16, residual_channels=8, latent_dim=8)
    return build_model(config, quantizer or KSOMConfig(codes=12, grid=(4, 3))).train()


def test_codes_alone_give_the_reconstruction():
    model = tiny().eval()
    batch = image_batch(torch.rand(2, 3, 32, 48))
    reconstruction, codes = model.reconstruct(batch.pixels)
    assert {level: tuple(found.shape) for level, found in codes.items()} == {
        "top": (2, 4, 6, 1),
        "bottom": (2, 8, 12, 1),
    }
    torch.testing.assert_close(model.decode_codes(codes), reconstruction)
    encoded, tokens = model.encode_codes(batch)
    assert all(torch.equal(encoded[level], codes[level]) for level in codes)
    assert tokens.tolist() == [4 * 6 + 8 * 12] * 2


def test_the_bottom_knows_the_top():
    model = tiny().eval()
    batch = image_batch(torch.rand(2, 3, 32, 32))
    seen = []
    model.quantizers["bottom"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch)
    model.quantizers["top"].set_codebook(torch.full((1, 12, 8), 3.0))
    model(batch)
    assert (seen[0] - seen[1]).abs().max() > 0.1


def test_encoding_leaves_training_alone():
    model = tiny(KNNSimplexConfig(codes=12, sampler="gumbel"))
    model.encode_codes(image_batch(torch.rand(2, 3, 32, 32)))
    assert not any(tensor.any() for quantizer in model.quantizers.values() for tensor in quantizer.pending())


def test_both_levels_are_lost_measured_and_updated():
    model = tiny()
    batch = image_batch(torch.rand(4, 3, 32, 32))
    sync = CodebookSync(model)
    assert list(sync.quantizers) == ["quantizers.top", "quantizers.bottom"]
    output = model(batch)
    assert set(output.losses) == {"reconstruction", "quantizer_top_commitment", "quantizer_bottom_commitment"}
    top, bottom = *output.coarser, output.quantizer
    torch.testing.assert_close(output.losses["quantizer_top_commitment"], top.losses["commitment"] * batch.targets)
    assert (top.codes.shape[1:], bottom.codes.shape[1:]) == ((4, 4, 1), (8, 8, 1))
    throughput = Throughput(torch.device("cpu"), "fp32")
    throughput.add(batch, output)
    rates = throughput.read(0.0, 0.0)
    assert rates["tokens_per_second"] == pytest.approx(rates["samples_per_second"] * (16 + 64))
    torch.stack(list(output.losses.values())).sum().backward()
    assert model.latents_top.weight.grad.any()
    before = [quantizer.codebook().clone() for quantizer in sync.quantizers.values()]
    health = sync.step()
    assert [found.tokens for found in health.quantizers] == [4 * 16, 4 * 64]
    for old, quantizer in zip(before, sync.quantizers.values(), strict=True):
        assert not torch.equal(old, quantizer.codebook())


def test_metrics_are_of_all_levels_and_of_each():
    model = tiny().eval()
    batches = [image_batch(torch.rand(rows, 3, 32, 32)) for rows in (3, 2)]
    metrics, counts = measure_images(model, batches, "cpu", NetworkFiles())
    assert (metrics["tokens"], metrics["tokens/top"], metrics["tokens/bottom"]) == (5 * 80, 5 * 16, 5 * 64)
    assert [sum(of_level) for of_level in counts] == [5 * 16, 5 * 64]
    for name in ("codebook_perplexity", "codebook_usage", "quantization_error"):
        assert metrics[name] == pytest.approx((metrics[f"{name}/top"] + metrics[f"{name}/bottom"]) / 2)
    assert metrics["dead_codes"] == sum(of_level.count(0) for of_level in counts)
    assert metrics["codebook_usage/top"] == pytest.approx(sum(map(bool, counts[0])) / 12)


def test_every_model_has_its_quantizers_by_level():
    model = tiny()
    assert quantizers_of(model) == {"top": model.quantizers["top"], "bottom": model.quantizers["bottom"]}
