"""The probe against what can be computed from latents and codes directly."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.codebooks import CodebookSync
from pipeline.evaluation.probe import QuantizerProbe
from pipeline.quantizers import build_quantizer


def build(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return build_quantizer({"kind": kind, "dim": 4, "codes": 6, **options}).eval()


def latents(*shape: int) -> Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(1))


def test_metrics_of_a_plain_codebook() -> None:
    quantizer = build("ema")
    z = latents(3, 50)
    with QuantizerProbe(quantizer) as probe:
        out = quantizer(z)
    metrics = probe.compute()
    counts = torch.bincount(out.codes.flatten(), minlength=6).double()[None]
    shares = counts / 150
    assert metrics["tokens"] == 150
    assert metrics["codebook_perplexity"] == pytest.approx(math.exp(-float(torch.special.xlogy(shares, shares).sum())))
    assert metrics["codebook_usage"] == pytest.approx(float((counts > 0).double().mean()))
    assert metrics["dead_codes"] == int((counts == 0).sum())
    nearest = quantizer.codebook()[0][out.codes[..., 0]]
    error = (z - nearest).square().sum(-1).mean() / torch.cov(z.reshape(-1, 4).T, correction=0).trace()
    assert metrics["quantization_error_relative"] == pytest.approx(float(error), rel=1e-4)
    assert metrics["latent_dimension"] == 4
    assert "topographic_error" not in metrics


def test_the_cut_into_batches_does_not_matter() -> None:
    quantizer = build("ksom", grid=[3, 2])
    z = latents(60)
    with QuantizerProbe(quantizer) as whole:
        quantizer(z)
    with QuantizerProbe(quantizer) as parts:
        for part in z.split(7):
            quantizer(part)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-5, nan_ok=True)
    assert torch.equal(parts.counts.counts, whole.counts.counts)


def test_padding_is_not_counted() -> None:
    quantizer = build("ema")
    z, mask = latents(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    mask[0, :7] = mask[1, :3] = True
    with QuantizerProbe(quantizer) as masked:
        quantizer(z, mask=mask)
    with QuantizerProbe(quantizer) as plain:
        quantizer(z[mask])
    assert masked.tokens == 10
    assert masked.compute() == pytest.approx(plain.compute(), rel=1e-5, nan_ok=True)


def test_an_ordered_map_has_no_topographic_error() -> None:
    """Codes on the line y = x in grid order: the two best codes of any latent lie beside each other."""
    quantizer = build("ksom", grid=[6])
    line = torch.arange(6.0)[:, None].repeat(1, 4)
    state = quantizer.state_dict()
    for name, value in state.items():
        if value.shape[-2:] == (6, 4):
            state[name] = line.expand_as(value).clone()
    quantizer.load_state_dict(state)
    assert torch.equal(quantizer.codebook()[0], line)
    z = torch.linspace(-0.4, 5.4, 101)[:, None].repeat(1, 4)
    with QuantizerProbe(quantizer) as probe:
        quantizer(z)
    metrics = probe.compute()
    assert metrics["topographic_error"] == 0.0
    assert metrics["grid_correlation"] == pytest.approx(1.0)
    assert metrics["code_dimension"] == 1


def test_watching_changes_nothing_and_ends() -> None:
    quantizer = build("ksom", grid=[3, 2]).train()
    codebook = quantizer.codebook().clone()
    with QuantizerProbe(quantizer) as probe:
        quantizer(latents(20))
    quantizer(latents(20))
    assert probe.tokens == 20
    assert torch.equal(quantizer.codebook(), codebook)


def test_nothing_seen_is_an_error() -> None:
    with QuantizerProbe(build("ema")) as probe:
        pass
    with pytest.raises(ValueError, match="no real token"):
        probe.compute()


@pytest.mark.parametrize("kind", ["ksom", "gd_som", "rotation", "ste"])
def test_latents_of_length_1_are_what_is_measured(kind: str) -> None:
    """Metrics with normalise=l2 are those of the normalised latents, whatever length they came with."""
    quantizer = build(kind, normalise="l2")
    z = latents(60)
    with QuantizerProbe(quantizer) as probe:
        out = quantizer(100 * z)
    with QuantizerProbe(quantizer) as of_unit:
        quantizer(torch.nn.functional.normalize(z, dim=-1))
    metrics, expected = probe.compute(), of_unit.compute()
    del metrics["latent_dimension"], expected["latent_dimension"]  # the encoder's own
    assert metrics == pytest.approx(expected, rel=1e-4)
    unit = torch.nn.functional.normalize(z, dim=-1)
    error = (out.vectors.detach() - unit).square().sum(-1).mean() / torch.cov(unit.T, correction=0).trace()
    assert metrics["quantization_error_relative"] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("kind", ["ksom", "gd_som", "simvq"])
def test_projected_latents_are_compared_in_the_codes_space(kind: str) -> None:
    quantizer = build(kind, codebook_dim=2)
    z = latents(60)
    with QuantizerProbe(quantizer) as probe:
        quantizer(z)
    metrics = probe.compute()
    compared = quantizer.real_latents(z, None).detach()
    error = (compared - quantizer.vectors_of(quantizer.encode(z)).squeeze(1)).square().sum(-1).mean()
    assert metrics["quantization_error"] == pytest.approx(float(error), rel=1e-4)
    assert metrics["latent_dimension"] == 4
    assert metrics["token_concentration"] > 0
    if kind != "simvq":
        inner = build_quantizer({"kind": kind, "dim": 2, "codes": 6})
        inner.load_state_dict({n: v for n, v in quantizer.state_dict().items() if not n.startswith("project")})
        with QuantizerProbe(inner) as plain:
            inner.eval()(quantizer.project_in(z).detach())
        for name in (
            "quantization_error_relative",
            "code_latent_divergence",
            "topographic_error",
            "grid_correlation",
            "token_concentration",
            "codebook_perplexity",
        ):
            assert metrics[name] == pytest.approx(plain.compute()[name], rel=1e-4)


@pytest.mark.parametrize("kind", ["ste", "affine", "knn_simplex", "gumbel", "gd_som", "simvq", "rotation"])
def test_every_family_can_be_watched(kind: str) -> None:
    quantizer = build(kind)
    with QuantizerProbe(quantizer) as probe:
        quantizer(latents(40))
    metrics = probe.compute()
    assert 1 <= metrics["codebook_perplexity"] <= 6
    assert math.isfinite(metrics["latent_dimension"])
    assert ("quantization_error" in metrics) == (kind not in ("knn_simplex", "gumbel"))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "fsq", "levels": [3, 4, 3, 5], "codes": None},
        {"kind": "lfq", "codes": 4, "groups": 2},
        {"kind": "lfq", "codes": 16, "spherical": True},
        {"kind": "residual", "levels": 2},
    ],
)
def test_kinds_without_a_table_of_codes_and_of_several_levels(options: dict) -> None:
    """The error is that of latents as they are compared: bounded, of length 1, as they come."""
    quantizer = build(**options)
    z = latents(200)
    with QuantizerProbe(quantizer) as probe:
        quantizer(z)
    metrics = probe.compute()
    compared = quantizer.real_latents(z, None)
    error = (quantizer.decode(quantizer.encode(z)) - compared).square().sum(-1).mean()
    variance = torch.cov(compared.T, correction=0).trace()
    assert metrics["quantization_error"] == pytest.approx(float(error), rel=1e-4)
    assert metrics["quantization_error_relative"] == pytest.approx(float(error / variance), rel=1e-4)
    assert len(probe.code_counts()) == quantizer.groups
    assert all(sum(counts) == 200 for counts in probe.code_counts())
    assert 1 < metrics["codebook_perplexity"] <= quantizer.codes
    assert math.isfinite(metrics["code_dimension"])


def test_dropped_levels_are_not_counted() -> None:
    quantizer = build("residual", levels=3, dropout=1.0).train()
    with QuantizerProbe(quantizer) as probe:
        for seed in range(10):
            torch.manual_seed(seed)
            quantizer(latents(20))
    totals = [sum(counts) for counts in probe.code_counts()]
    assert totals[0] == 200
    assert totals == sorted(totals, reverse=True)
    assert 0 < totals[-1] < 200


def test_without_a_codebook_only_latents_are_measured() -> None:
    quantizer = build_quantizer({"kind": "identity", "dim": 4})
    with QuantizerProbe(quantizer) as probe:
        quantizer(latents(40))
    assert probe.compute() == {"tokens": 40, "latent_dimension": 4}
    assert probe.code_counts() == []


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "ema", "groups": 2},
        {"kind": "ksom", "grid": [3, 2]},
        {"kind": "gd_som", "normalise": "l2"},
        {"kind": "affine", "codebook_dim": 2},
        {"kind": "knn_simplex", "logits": "distance", "neighbours": 1},
        {"kind": "gumbel", "groups": 2},
        {"kind": "lfq", "codes": 16},
    ],
    ids=lambda options: options["kind"],
)
def test_training_measures_what_evaluation_measures(options: dict) -> None:
    """Of the same tokens, all of which a watched step looks at."""
    quantizer = build(**options).train()
    if options["kind"] == "gumbel":  # its codes are drawn in training
        quantizer.config = quantizer.config.model_copy(update={"temperature": (1e-6, 1e-6, 1.0)})
        with torch.no_grad():
            quantizer.head.weight.mul_(1e6)
    sync = CodebookSync(quantizer, watch_every=1)
    z = latents(600)
    with QuantizerProbe(quantizer) as probe:
        quantizer(z)
    evaluated = probe.compute()
    (trained,) = sync.step().quantizers
    normalised = "codebook_dim" in options or "normalise" in options  # evaluation tells the encoder's own dimension
    for name, value in trained.measures.items():
        if not (name == "latent_dimension" and normalised):
            assert evaluated[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert set(evaluated) - set(trained.measures) == {
        "tokens",
        "codebook_usage",
        "codebook_perplexity",
        "dead_codes",
        *(["token_concentration"] if "token_concentration" in evaluated else []),
    }
