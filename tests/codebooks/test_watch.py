"""Sums of watched steps: which tokens they are of, what they add up to, and when there are any."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.watch import WATCHED_DIM, WATCHED_TOKENS, Watch, spread_tokens
from pipeline.quantizers import build_quantizer

DIM = 6


def build(kind="ema", **options):
    torch.manual_seed(0)
    codes = {} if kind == "identity" else {"codes": 8}
    return build_quantizer({"kind": kind, "dim": DIM, **codes, **options}).train()


def watched(quantizer):
    """The quantizer with a watch of its own, and that."""
    quantizer.watch = Watch(quantizer)
    return quantizer.watch


def read(watch):
    return watch.read(watch.pending())


def latents(*shape):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tokens", [0, 1, WATCHED_TOKENS, WATCHED_TOKENS + 1, 5000, 10**7])
def test_watched_tokens_are_spread_over_all(tokens):
    chosen = spread_tokens(tokens)
    assert len(chosen) == min(tokens, WATCHED_TOKENS)
    if tokens:
        assert int(chosen[0]) >= 0
        assert int(chosen[-1]) < tokens
        assert tokens == 1 or bool((chosen.diff() > 0).all())
        assert len(chosen) == tokens or int(chosen.diff().max()) <= 2 * tokens / WATCHED_TOKENS + 1


@pytest.mark.parametrize("columns", [8, 16, 50, 64])
def test_watched_tokens_favour_no_column_of_an_image(columns):
    """Of 16,384 tokens in rows of an image every 16th would be one and the same column of 16."""
    places = torch.bincount(spread_tokens(16_384) % columns, minlength=columns)
    assert int(places.min()) > 0.7 * WATCHED_TOKENS / columns
    assert int(places.max()) < 1.3 * WATCHED_TOKENS / columns


def test_sums_of_few_tokens_are_those_of_all():
    quantizer = build("ksom", grid=[4, 2])
    watch, z = watched(quantizer), latents(2, 50)
    mask = torch.rand(2, 50, generator=torch.Generator().manual_seed(2)) < 0.7
    outputs = [quantizer(part, where) for part, where in zip(z, mask, strict=True)]
    sums, real = read(watch), z[mask].double()
    codes = torch.cat([output.codes[where] for output, where in zip(outputs, mask, strict=True)])[:, 0]
    codebook = quantizer.codebook()[0].double()
    assert sums.tokens == sums.latents.count == len(real)
    assert sums.squared_error == pytest.approx(float((real - codebook[codes]).square().sum()), rel=1e-5)
    nearest = torch.cdist(real, codebook).argsort(dim=1)
    assert sums.torn == int((~quantizer.are_neighbours(nearest[:, 0], nearest[:, 1])).sum())
    assert 0 < sums.torn < sums.tokens
    torch.testing.assert_close(sums.latents.mean(), real.mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(sums.latents.covariance(), torch.cov(real.T, correction=0), atol=1e-5, rtol=0)
    assert sums.smoothed_tokens == 0


def test_many_tokens_are_watched_in_part():
    quantizer = build()
    watch, z = watched(quantizer), latents(3000)
    quantizer(z)
    sums, some = read(watch), z[spread_tokens(3000)].double()
    assert sums.tokens == WATCHED_TOKENS
    torch.testing.assert_close(sums.latents.mean(), some.mean(dim=0), atol=1e-6, rtol=0)


def test_smoothed_kinds_are_measured_by_their_hard_codes_and_tell_their_gap():
    quantizer = build("knn_simplex", logits="distance", neighbours=1)
    watch, z = watched(quantizer), latents(40)
    outputs = [quantizer(part) for part in z.split(30)]  # of 30 and of 10 tokens
    sums = read(watch)
    hard = quantizer.codebook()[0][torch.cat([output.codes for output in outputs])[:, 0]]
    assert sums.squared_error == pytest.approx(float((z - hard).double().square().sum()), rel=1e-5)
    first, second = (float(output.metrics["soft_hard_gap"]) for output in outputs)
    assert sums.smoothed_tokens == 40
    assert sums.gap == pytest.approx(30 * first + 10 * second, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"kind": "identity"}, DIM),
        ({"kind": "gumbel", "codes": 4, "groups": 2, "input_dim": 9}, 9),
        ({"kind": "ema", "codes": 4, "codebook_dim": 3}, 3),
        ({"kind": "lfq", "codes": 32}, 5),
        ({"kind": "fsq", "levels": [5, 4, 3]}, 3),
    ],
)
def test_latents_are_seen_as_they_are_compared(options, size):
    quantizer = build_quantizer({"dim": DIM, **options}).train()
    watch = watched(quantizer)
    z = torch.randn(20, quantizer.input_dim)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantizer(z.bfloat16())
    compared = quantizer.real_latents(z.bfloat16(), None).detach().double()
    assert compared.shape[1] == size
    torch.testing.assert_close(read(watch).latents.mean(), compared.mean(dim=0), atol=1e-6, rtol=1e-6)


def test_neither_evaluation_nor_padding_nor_recomputation_is_seen():
    quantizer = build()
    watch = watched(quantizer)
    quantizer(latents(4), torch.zeros(4, dtype=torch.bool))
    quantizer.encode(latents(4))
    quantizer.eval()(latents(4))
    assert read(watch).tokens == 0
    quantizer.train()
    z = latents(10).requires_grad_()
    checkpoint(lambda z: quantizer(z).vectors, z, use_reentrant=False).sum().backward()
    assert read(watch).tokens == 10


def test_watched_steps_come_as_often_as_asked_and_are_those_of_the_next_step_after_a_load():
    quantizer = build()
    sync = CodebookSync(quantizer, watch_every=3)
    seen = []
    for _ in range(7):
        quantizer(latents(20))
        seen.append("latent_dimension" in sync.step().summary())
    assert seen == [False, False, True, False, False, True, False]
    state, again = quantizer.state_dict(), build()
    sync = CodebookSync(again, watch_every=4)
    again.load_state_dict(state)  # 7 steps done: the next is the 8th
    again(latents(20))
    assert "latent_dimension" in sync.step().summary()
    again(latents(20))
    assert "latent_dimension" not in sync.step().summary()


def test_sums_belong_to_one_step():
    quantizer = build("identity")
    sync = CodebookSync(quantizer, watch_every=1)
    for tokens in (20, 30):
        quantizer(latents(tokens))
        (health,) = sync.step().quantizers
        assert health.tokens == tokens


def test_an_unwatched_quantizer_is_left_alone():
    quantizer = build()
    CodebookSync(quantizer)
    assert quantizer.watch is None


def test_levels_of_a_residual_quantizer_are_watched_and_their_container_is_not():
    quantizer = build("residual", levels=2)
    sync = CodebookSync(nn.ModuleDict({"quantizer": quantizer}), watch_every=1)
    quantizer(latents(50))
    health = sync.step()
    assert [of_level.name for of_level in health.quantizers] == ["quantizer.levels.0", "quantizer.levels.1"]
    assert all(of_level.measures["quantization_error"] > 0 for of_level in health.quantizers)


def test_latents_whose_products_would_fill_a_step_are_counted_only():
    def summary(dim):
        quantizer = build_quantizer({"kind": "som", "dim": dim, "codes": 8, "steps": 9}).train()
        sync = CodebookSync(quantizer, watch_every=1)
        quantizer(torch.rand(20, dim))
        return sync.step().summary()

    assert "latent_dimension" in summary(WATCHED_DIM)
    of_larger = summary(WATCHED_DIM + 1)
    assert "latent_dimension" not in of_larger
    assert of_larger["codebook_usage"] > 0


def test_watching_changes_no_codebook():
    plain, other = build("ksom"), build("ksom")
    for quantizer, every in ((plain, 0), (other, 1)):
        sync = CodebookSync(quantizer, watch_every=every)
        for _ in range(3):
            quantizer(latents(200))
            sync.step()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
