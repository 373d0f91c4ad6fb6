"""Health of codebooks: usage and perplexity by group, measures of watched steps, names."""

import math

import pytest
import torch
from torch import nn

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.collapse import SecondMoments, code_latent_divergence, fit_codes
from pipeline.codebooks.health import CodebookHealth, measure_usage
from pipeline.codebooks.topology import grid_correlation
from pipeline.quantizers import build_quantizer


def test_perplexity_is_the_exponential_of_the_entropy_of_each_group():
    health = measure_usage("speech", torch.tensor([[4.0, 4.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [4.0, 2.0, 1.0, 1.0]]))
    assert health.tokens == 8
    assert health.usages == [0.5, 0.25, 1.0]
    assert health.unused == [2, 3, 0]
    assert health.perplexities == pytest.approx([2.0, 1.0, math.exp(1.75 * math.log(2))])
    summary = CodebookHealth(lambda: [health]).summary()
    assert summary["codebook_usage"] == pytest.approx(1.75 / 3)
    assert summary["codebook_unused"] == 5
    assert set(summary) == {
        "codebook_usage",
        "codebook_perplexity",
        "codebook_unused",
        "codebook_replaced",
        "collapse_tokens",
    }


def test_no_token_is_no_perplexity():
    assert measure_usage("none", torch.zeros(1, 5)).perplexities == [0.0]
    assert CodebookHealth(list).summary() == {}


def test_health_is_that_of_its_step_whenever_it_is_looked_at() -> None:
    quantizer = build_quantizer({"kind": "ema", "dim": 2, "codes": 4})
    sync = CodebookSync(quantizer)
    quantizer(torch.randn(7, 2))
    late = sync.step()
    quantizer(torch.zeros(3, 2))
    at_once = sync.step().quantizers[0]
    assert (late.quantizers[0].tokens, at_once.tokens) == (7, 3)
    assert late.quantizers is late.quantizers


def test_several_quantizers_are_named_and_identity_is_left_out():
    model = nn.ModuleDict(
        {
            "coarse": build_quantizer({"kind": "ema", "dim": 2, "codes": 4}),
            "fine": build_quantizer({"kind": "ste", "dim": 2, "codes": 8}),
            "passing": build_quantizer({"kind": "identity", "dim": 2}),
        }
    )
    sync = CodebookSync(model)
    for quantizer in model.values():
        quantizer(torch.zeros(6, 2))
    summary = sync.step().summary()
    assert summary["codebook_usage/coarse"] == 0.25
    assert summary["codebook_usage/fine"] == 0.125
    assert summary["codebook_usage"] == pytest.approx(0.1875)
    assert summary["codebook_perplexity/fine"] == 1.0
    assert not any("passing" in name for name in summary)


def test_a_quantizer_used_twice_is_one_and_a_model_without_any_is_healthy():
    quantizer = build_quantizer({"kind": "ema", "dim": 2, "codes": 4})
    sync = CodebookSync(nn.ModuleList([quantizer, quantizer]))
    quantizer(torch.zeros(3, 2))
    quantizer(torch.zeros(4, 2))
    (health,) = sync.step().quantizers
    assert health.tokens == 7
    empty = CodebookSync(nn.Linear(2, 2))
    assert empty.step().summary() == {}
    assert empty.checksum() == CodebookSync(nn.Linear(3, 3)).checksum()


def test_measures_of_a_map_are_those_of_its_latents_and_codes():
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "ksom", "dim": 4, "codes": 12, "grid": [4, 3]})
    codebook = quantizer.codebook()[0].clone()  # before the update
    sync = CodebookSync(quantizer, watch_every=1)
    z = torch.randn(500, 4) * torch.tensor([3.0, 1.0, 0.5, 0.01])
    codes = quantizer(z).codes[:, 0]
    (health,) = sync.step().quantizers
    error = float((z - codebook[codes]).square().sum(dim=1).double().mean())
    variance = float(torch.cov(z.double().T, correction=0).trace())
    nearest = torch.cdist(z, codebook).argsort(dim=1)
    torn = ~quantizer.are_neighbours(nearest[:, 0], nearest[:, 1])
    used, moments = torch.bincount(codes, minlength=12) > 0, SecondMoments()
    moments.add(z)
    assert health.measures == pytest.approx(
        {
            "latent_dimension": 3,
            "code_dimension": 4,
            "quantization_error": error,
            "quantization_error_relative": error / variance,
            "code_latent_divergence": code_latent_divergence(moments, [fit_codes(codebook, used)]),
            "topographic_error": float(torn.double().mean()),
            "grid_correlation": grid_correlation(codebook, quantizer.grid_distance()),
        },
        rel=1e-4,
    )


def test_a_large_map_is_measured_by_some_of_its_codes():
    """All pairs of 16,384 codes on a grid would take a gigabyte."""
    quantizer = build_quantizer({"kind": "ksom", "dim": 2, "codes": 16_384, "grid": [128, 128]})
    places = torch.stack([torch.arange(16_384) % 128, torch.arange(16_384) // 128], dim=1)
    quantizer.code_vectors.copy_(places)
    sync = CodebookSync(quantizer, watch_every=1)
    quantizer(torch.rand(64, 2) * 127)
    measures = sync.step().quantizers[0].measures
    assert measures["grid_correlation"] == pytest.approx(1.0)
    assert measures["topographic_error"] == 0.0


def test_several_quantizers_have_their_measures_by_name_and_one_has_not():
    model = nn.ModuleDict(
        {
            "coarse": build_quantizer({"kind": "ema", "dim": 3, "codes": 4}),
            "passing": build_quantizer({"kind": "identity", "dim": 3}),
        }
    )
    sync = CodebookSync(model, watch_every=1)
    z = torch.randn(50, 3)
    for quantizer in model.values():
        quantizer(z if quantizer.codes else z * torch.tensor([1.0, 0.0, 0.0]))
    summary = sync.step().summary()
    assert summary["latent_dimension/coarse"] == 3
    assert summary["latent_dimension/passing"] == 1
    assert summary["latent_dimension"] == 2
    assert summary["quantization_error"] == summary["quantization_error/coarse"]
    assert not any(name.startswith("codebook_") and name.endswith("passing") for name in summary)
    alone = CodebookSync(model["passing"], watch_every=1)
    model["passing"](z)
    assert alone.step().summary() == {"latent_dimension": 3, "collapse_embeddings": 0.0}


def test_a_step_without_tokens_has_no_measures():
    quantizer = build_quantizer({"kind": "ksom", "dim": 3, "codes": 4})
    sync = CodebookSync(quantizer, watch_every=1)
    for mask in (None, torch.zeros(5, dtype=torch.bool)):
        if mask is not None:
            quantizer(torch.randn(5, 3), mask)
        health = sync.step()
        assert health.quantizers[0].measures == {}
        assert health.warnings == []


def test_the_checksum_sees_every_bit_of_codebook_state():
    quantizer = build_quantizer({"kind": "ema", "dim": 2, "codes": 4, "replace_after": 5})
    sync = CodebookSync(quantizer)
    seen = {sync.checksum()}
    for name, tensor in quantizer.state_dict().items():
        if tensor.is_floating_point():
            tensor.view(torch.int32).view(-1)[0] += 1  # the last bit
        else:
            tensor.view(-1)[0] += 1
        assert sync.checksum() not in seen, name
        seen.add(sync.checksum())
