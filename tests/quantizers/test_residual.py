"""Residual quantization: levels against quantizers chained by hand, gradients, dropped levels, what is refused."""

import copy
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import build_quantizer

DIM = 4


def build(level=None, **options):
    torch.manual_seed(0)
    return build_quantizer({"kind": "residual", "dim": DIM, "codes": 8, "levels": 3, "level": level or {}, **options})


def latents(*shape, seed=1):
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def chained(quantizer, z):
    """By hand: each level's codes, their vectors, and what was left over before it."""
    codes, vectors, left = [], [], [z]
    for codebook in quantizer.codebook():
        codes.append(torch.cdist(left[-1], codebook).argmin(dim=-1))
        vectors.append(codebook[codes[-1]])
        left.append(left[-1] - vectors[-1])
    return torch.stack(codes, dim=-1), vectors, left[:-1]


def test_golden_values():
    quantizer = build(dim=2, codes=2, levels=2)
    quantizer.set_codebook(torch.tensor([[[1.0, 0], [-1, 0]], [[0, 0.5], [0, -0.5]]]))
    output = quantizer(torch.tensor([[0.75, 0.25], [-1.0, -1.0]]))
    assert output.codes.tolist() == [[0, 0], [1, 1]]
    assert output.vectors.tolist() == [[1.0, 0.5], [-1.0, -0.5]]
    first = (0.25**2 + 0.25**2 + 0 + 1) / 4
    second = (0.25**2 + 0.25**2 + 0 + 0.5**2) / 4
    assert float(output.losses["commitment"]) == pytest.approx(0.25 * (first + second) / 2)
    assert output.usage.tolist() == [[1, 1], [1, 1]]
    assert quantizer.decode(torch.tensor([[0, 1], [1, -1], [-1, -1]])).tolist() == [[1, -0.5], [-1, 0], [0, 0]]


@pytest.mark.parametrize("kind", ["ema", "ksom", "gd_som", "ste", "affine", "simvq"])
def test_every_level_quantizes_what_is_left_over(kind):
    quantizer = build({"kind": kind}).train()
    z = latents(50)
    output = quantizer(z)
    codes, vectors, _ = chained(quantizer, z)
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.vectors.detach(), sum(vectors))
    assert torch.equal(quantizer.decode(codes), output.vectors.detach())


@pytest.mark.parametrize("level", [{"kind": "ema", "decay": 0.9}, {"kind": "ste", "inner_steps": 2, "inner_rate": 0.3}])
def test_levels_are_updated_as_quantizers_of_their_own(level):
    quantizer = build(level).train()
    alone = copy.deepcopy(list(quantizer.levels))
    sync, syncs = CodebookSync(quantizer), [CodebookSync(part) for part in alone]
    for step in range(4):
        z = latents(30, seed=step)
        _, _, left = chained(quantizer, z)
        quantizer(z)
        for part, residual in zip(alone, left, strict=True):
            part(residual)
        health = sync.step()
        for part_sync in syncs:
            part_sync.step()
    assert [of_level.name for of_level in health.quantizers] == ["levels.0", "levels.1", "levels.2"]
    assert [of_level.tokens for of_level in health.quantizers] == [30, 30, 30]
    for level, part in zip(quantizer.levels, alone, strict=True):
        torch.testing.assert_close(level.codebook(), part.codebook())


def test_every_levels_commitment_reaches_the_latents():
    """In encodec, DAC and others it ends at the first level (encodec issue 25, descript-audio-codec issue 107)."""
    quantizer = build().train()
    z = latents(20).requires_grad_()
    quantizer(z).losses["commitment"].backward()

    _, vectors, left = chained(quantizer, z.detach())
    of_levels = [2 * 0.25 / z.numel() / 3 * (r - c).double() for r, c in zip(left, vectors, strict=True)]
    torch.testing.assert_close(z.grad.double(), sum(of_levels), atol=1e-9, rtol=1e-5)
    assert all(part.abs().max() > 1e-4 for part in of_levels)


def test_the_gradient_goes_straight_through_once():
    """Not once a level, as in vector-quantize-pytorch 1.32, which adds up the levels' straight-through estimators."""
    z = latents(20).requires_grad_()
    upstream = latents(20, seed=2)
    (build().train()(z).vectors * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)


def test_codes_of_all_levels_get_their_share_of_the_tasks_gradient():
    quantizer = build({"kind": "ste", "sync_nu": 0.3, "alpha": 0}).train()
    z, upstream = latents(20).requires_grad_(), latents(20, seed=2)
    output = quantizer(z)
    (output.vectors * upstream).sum().backward()
    torch.testing.assert_close(z.grad, upstream)
    for number, level in enumerate(quantizer.levels):
        expected = torch.zeros(8, DIM).index_add_(0, output.codes[:, number], 0.3 * upstream)
        torch.testing.assert_close(level.code_vectors.weight.grad[0], expected)


def test_dropped_levels_add_nothing_and_count_nothing():
    quantizer = build(dropout=1.0, levels=4).train()
    calls = []
    for level in quantizer.levels:
        level.register_forward_hook(lambda module, args, output: calls.append(module))
    seen = set()
    z = latents(10)
    for seed in range(30):
        torch.manual_seed(seed)
        output = quantizer(z)
        kept = int((output.codes[0] >= 0).sum())
        seen.add(kept)
        assert bool((output.codes[:, :kept] >= 0).all())
        assert bool((output.codes[:, kept:] == -1).all())
        assert output.usage.sum(dim=1).tolist() == [10.0] * kept + [0.0] * (4 - kept)
        _, vectors, left = chained(quantizer, z)
        torch.testing.assert_close(output.vectors, sum(vectors[:kept]))
        assert torch.equal(quantizer.decode(output.codes), output.vectors)
        errors = [0.25 * float((r - c).square().mean()) for r, c in zip(left[:kept], vectors[:kept], strict=True)]
        assert float(output.losses["commitment"]) == pytest.approx(sum(errors) / kept)
    assert seen == {1, 2, 3, 4}
    assert len(calls) == 30 * 4  # the n-th forward is the n-th micro-batch to every level
    pending = [float(level.pending()[0].sum()) for level in quantizer.levels]
    assert pending == sorted(pending, reverse=True)
    assert 300 == pending[0] > pending[-1] > 0


def order_of_modules(quantizer, z):
    """How many levels a step used, and the modules that it went through, as DeepSpeed's ZeRO 3 sees them: each forward
    of a module, and in backward each tensor of its output."""
    order = []

    def follow(name):
        def look(module, args, output):
            order.append(name)
            losses = list(getattr(output, "losses", {}).values())
            for tensor in [*(output if isinstance(output, tuple) else [output]), *losses]:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: order.append(name))

        return look

    for name, module in quantizer.named_modules():
        module.register_forward_hook(follow(name))
    output = quantizer(z)
    (output.vectors.sum() + sum(output.losses.values())).backward()
    return int((output.codes[0] >= 0).sum()), order


@pytest.mark.parametrize(
    "level", [{"kind": "ste", "sync_nu": 0.5}, {"kind": "affine", "sync_nu": 0.5}, {"kind": "ste"}, {"kind": "simvq"}]
)
def test_ranks_that_drop_other_levels_go_through_the_same_modules(level):
    """ZeRO 3 gathers parameters in the order of the first step, and refuses ranks whose orders differ."""
    orders = {}
    for seed in range(12):
        quantizer = build(level, dropout=1.0).train()
        torch.manual_seed(seed)
        kept, orders[kept] = order_of_modules(quantizer, latents(10).requires_grad_())
    assert orders.keys() == {1, 2, 3}
    assert orders[1] == orders[2] == orders[3]


def test_how_often_levels_are_dropped():
    quantizer = build(dropout=0.25, levels=5).train()
    torch.manual_seed(0)
    kept = torch.tensor([int((quantizer(latents(1)).codes >= 0).sum()) for _ in range(1000)])
    shares = torch.bincount(kept, minlength=6) / 1000
    assert float(shares[5]) == pytest.approx(0.75 + 0.25 / 5, abs=0.04)
    for number in range(1, 5):
        assert float(shares[number]) == pytest.approx(0.25 / 5, abs=0.03)
    quantizer.eval()
    assert all(bool((quantizer(latents(1)).codes >= 0).all()) for _ in range(50))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_drops_the_same_levels_and_counts_them_once(reentrant):
    level = {"kind": "ste", "sync_nu": 0.5}
    plain, recomputed = build(level, dropout=1.0).train(), build(level, dropout=1.0).train()

    def total(quantizer, z):
        output = quantizer(z)
        return output.vectors.square().sum() + sum(output.losses.values())

    first, second = latents(10).requires_grad_(), latents(10).requires_grad_()
    for seed in range(6):
        torch.manual_seed(seed)
        total(plain, first).backward()
        torch.manual_seed(seed)
        checkpoint(total, recomputed, second, use_reentrant=reentrant).backward()
    torch.testing.assert_close(second.grad, first.grad)
    for one, other in zip(plain.levels, recomputed.levels, strict=True):
        torch.testing.assert_close(other.pending(), one.pending())
        torch.testing.assert_close(other.code_vectors.weight.grad, one.code_vectors.weight.grad)


def test_dead_codes_of_a_level_move_to_its_residuals():
    quantizer = build({"replace_after": 2, "replace_noise": 0.0}, codes=2, levels=2).train()
    start = torch.zeros(2, 2, DIM)
    start[:, 1] = 100  # never chosen
    quantizer.set_codebook(start)
    sync = CodebookSync(quantizer)
    z = latents(6)
    for _ in range(2):
        quantizer.set_codebook(start)
        _, _, left = chained(quantizer, z)
        quantizer(z)
        health = sync.step()
    assert [of_level.replaced for of_level in health.quantizers] == [1, 1]
    for level, residual in zip(quantizer.levels, left, strict=True):
        assert float((residual - level.codebook()[0, 1]).abs().sum(dim=1).min()) == 0


@pytest.mark.parametrize("kind", ["ema", "ste"])
def test_each_level_learns_to_lessen_the_error(kind):
    """On normal latents, from k-means and from what 100 steps make of random codes."""
    torch.manual_seed(0)
    for initialised in (True, False):
        quantizer = build({"kind": kind}, codes=16, levels=4).train()
        sync = CodebookSync(quantizer)
        if initialised:
            initialise_codebooks(quantizer, [latents(512, seed=seed) for seed in range(1000, 1004)])
        rate = 10.0
        for step in range(100):
            output = quantizer(latents(256, seed=step))
            if kind == "ste":
                gradients = torch.autograd.grad(sum(output.losses.values()), list(quantizer.parameters()))
                with torch.no_grad():
                    for parameter, gradient in zip(quantizer.parameters(), gradients, strict=True):
                        parameter -= rate * gradient
            sync.step()
        z = latents(2000, seed=5000)
        _, vectors, left = chained(quantizer, z)
        errors = [float(r.square().mean()) for r in [*left, left[-1] - vectors[-1]]]
        ratios = [after / before for before, after in itertools.pairwise(errors)]
        assert max(ratios) < 0.7, ratios
        assert errors[-1] < 0.06 * errors[0], errors


def test_latents_are_mapped_to_the_codes_space_and_back_as_a_whole():
    quantizer = build(dim=6, codebook_dim=3)
    assert quantizer.codebook().shape == (3, 8, 3)
    z = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    output = quantizer(z)
    codes, vectors, _ = chained(quantizer, quantizer.project_in(z).detach())
    assert torch.equal(output.codes, codes)
    torch.testing.assert_close(output.vectors, quantizer.project_out(sum(vectors)))
    torch.testing.assert_close(quantizer.decode(codes), output.vectors.detach())
    output.vectors.square().sum().backward()
    for tensor in (z, *quantizer.parameters()):
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "quantizer.levels=1: input should be greater than or equal to 2"),
        ({"dropout": 1.5}, "quantizer.dropout=1.5: input should be less than or equal to 1"),
        ({"groups": 2}, "quantizer.groups=2: unknown option"),
        ({"level": {"kind": "gumbel"}}, "quantizer.level.kind='gumbel': can't be a level's; use ema, ksom, gd_som, "),
        ({"level": {"decya": 0.5}}, "quantizer.level.decya=0.5: unknown option; did you mean decay?"),
        ({"level": {"kind": "ksom", "grid": [3, 3]}}, r"quantizer.level: grid=\[3, 3\] holds 9 codes, codes=8"),
        ({"level": {"codes": 4}}, "level.codes=4 is not a level's own: leave it out, codes is the same for all"),
        ({"level": {"groups": 2}}, "level.groups=2 is not a level's own: leave it out"),
        ({"level": {"normalise": "l2"}}, "level.normalise=l2 .* could not add up to latents: use none"),
        ({"level": {"kind": "ste", "normalise": "max_norm"}}, "level.normalise=max_norm .*: use none"),
        ({"level": {"replace_after": 1}}, "quantizer.level: replace_after=1 would move every code"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_bad_latents_change_no_level():
    quantizer = build().train()
    z = latents(5)
    z[2, 1] = float("nan")
    with pytest.raises(ValueError, match="1 of 5 latents hold NaN or infinity"):
        quantizer(z)
    assert all(not bool(pending.any()) for level in quantizer.levels for pending in level.pending())
