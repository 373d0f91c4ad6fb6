"""The gradient-trained Kohonen map: its neighbour loss against the plain formula, its grid, its options."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.topology import grid_correlation
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.gd_som import GDSOMConfig, GDSOMQuantizer
from pipeline.quantizers.neighbourhood import neighbourhood_matrix

LATENTS = torch.tensor([[0.2, 0.0], [0.1, 0.2], [1.1, 0.0]])
CODES = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]])


def build(codes: Tensor = CODES, **options) -> GDSOMQuantizer:
    groups, number, code_dim = codes.shape
    sizes = {"dim": groups * code_dim, "codes": number, "groups": groups}
    quantizer = build_quantizer({"kind": "gd_som", **sizes, **options})
    assert isinstance(quantizer, GDSOMQuantizer)
    quantizer.code_vectors.weight.data.copy_(codes)
    return quantizer


def plain_loss(codebook: Tensor, codes: Tensor, matrix: Tensor) -> Tensor:
    """(1/N) Σ_i Σ_j A_{q(i)j} ‖W_j − sg(W_{q(i)})‖² token by token: codebook ``(codes, dim)``, codes ``(tokens,)``."""
    apart = codebook.unsqueeze(0) - codebook.detach()[codes].unsqueeze(1)  # (tokens, codes, dim)
    return (matrix[codes] * apart.square().sum(dim=-1)).sum() / len(codes)


def test_golden_losses_and_gradients():
    """By hand, on a line at t = 0, where neighbours get a share of 1: codes 0, 0, 1 are chosen, so that L is
    (2·|W_1 − W_0|² + |W_0 − W_1|² + |W_2 − W_1|²) / 3 = (2 + 1 + 9) / 3, and its gradient on the first feature
    2/3 · (W_0 − W_1, 2·(W_1 − W_0), W_2 − W_1) = (−2/3, 4/3, 2)."""
    quantizer = build(grid=[3])
    latents = LATENTS.clone().requires_grad_()
    out = quantizer(latents)
    assert out.codes.flatten().tolist() == [0, 0, 1]
    assert torch.equal(out.vectors.detach(), CODES[0, [0, 0, 1]])
    values = {name: float(loss.detach()) for name, loss in out.losses.items()}
    assert values == pytest.approx({"codebook": 0.016667, "commitment": 0.004167, "kohonen": 4.0}, abs=1e-6)

    weight = quantizer.code_vectors.weight
    (gradient,) = torch.autograd.grad(out.losses["kohonen"], weight, retain_graph=True)
    torch.testing.assert_close(gradient[0], torch.tensor([[-2 / 3, 0.0], [4 / 3, 0.0], [2.0, 0.0]]))
    (gradient,) = torch.autograd.grad(out.losses["codebook"], weight, retain_graph=True)
    torch.testing.assert_close(
        gradient[0], torch.tensor([[-0.1, -0.066667], [-0.033333, 0], [0, 0]]), atol=1e-6, rtol=0
    )
    (out.losses["kohonen"] + out.losses["codebook"] + out.losses["commitment"]).backward()
    torch.testing.assert_close(latents.grad, 0.25 * 2 * (LATENTS - CODES[0, [0, 0, 1]]) / 6)


@pytest.mark.parametrize("neighbourhood", ["hard", "gaussian", "exponential"])
@pytest.mark.parametrize(("grid", "step"), [((12,), 0), ((4, 3), 0), ((4, 3), 50), ((3, 2, 2), 7)])
def test_the_neighbour_loss_is_the_published_one(neighbourhood, grid, step):
    """Value and gradient in float64, against the formula with tokens × codes and against gradcheck's differences."""
    generator = torch.Generator().manual_seed(step)
    codebook = torch.randn(2, 12, 3, generator=generator, dtype=torch.float64).requires_grad_()
    codes = torch.randint(0, 9, (40, 2), generator=generator)  # three codes are chosen by nothing
    quantizer = build(torch.zeros(2, 12, 3), grid=grid, neighbourhood=neighbourhood, shrink_step=0.2, base=4.0)
    quantizer.updates.fill_(step)
    shares = torch.stack([codes[:, group].bincount(minlength=12) / 40 for group in range(2)]).double()

    matrix = neighbourhood_matrix(neighbourhood, grid, step, 0.2, 4.0).double()
    expected = sum(plain_loss(codebook[group], codes[:, group], matrix) for group in range(2)) / 2
    (expected_gradient,) = torch.autograd.grad(expected, codebook)
    loss = quantizer.pull_neighbours(codebook, shares)
    (gradient,) = torch.autograd.grad(loss, codebook)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # the plain matrix is fp32
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("neighbourhood", ["hard", "gaussian", "exponential"])
def test_the_neighbour_loss_keeps_its_digits_far_from_the_origin(neighbourhood):
    """Codes 1 apart at 3000: squares near 10⁷ would round to whole numbers."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1, 12, 3, generator=generator) + 3000
    codes = torch.randint(0, 12, (40,), generator=generator)
    options = {"grid": (4, 3), "neighbourhood": neighbourhood}
    quantizer = build(codebook, **options)
    quantizer.updates.fill_(2000)
    weight = quantizer.code_vectors.weight
    shares = codes.bincount(minlength=12).unsqueeze(0) / 40
    loss = quantizer.pull_neighbours(weight, shares)
    loss.backward()

    exact = codebook[0].double().requires_grad_()
    matrix = neighbourhood_matrix(neighbourhood, (4, 3), 2000, 0.1, 10.0).double()
    expected = plain_loss(exact, codes, matrix)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=0)
    largest = float(exact.grad.abs().max())
    torch.testing.assert_close(weight.grad[0].double(), exact.grad, rtol=0, atol=1e-3 * largest)


def test_memory_is_not_tokens_by_codes():
    """65,536 tokens and 1,024 codes: the plain formula's distances would be 256 MB."""
    quantizer = build(torch.randn(1, 1024, 4), grid=[32, 32])
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    codes = torch.randint(0, 1024, (65_536, 1))
    shares = codes.flatten().bincount(minlength=1024).unsqueeze(0) / len(codes)
    with Largest():
        quantizer.pull_neighbours(quantizer.code_vectors(), shares).backward()
    assert largest <= 9 * 1024 * 6


def test_time_is_counted_in_optimiser_steps_and_weakens_the_pull():
    quantizer = build(grid=[3], shrink_step=1.0)
    sync = CodebookSync(quantizer)
    for expected in (4.0, 2.0, 4 / 3):
        for _ in range(2):  # micro-batches of one step
            assert float(quantizer(LATENTS).losses["kohonen"].detach()) == pytest.approx(expected)
        sync.step()
        assert torch.equal(quantizer.codebook(), CODES)  # the optimiser's, not the step's


def test_without_a_neighbourhood_neighbours_are_left_alone():
    quantizer = build(neighbourhood="none")
    loss = quantizer(LATENTS).losses["kohonen"]
    assert float(loss.detach()) == 0
    loss.backward()
    assert not quantizer.code_vectors.weight.grad.any()


@pytest.mark.parametrize("name", ["codebook_weight", "commitment", "kohonen_weight"])
def test_weights_weigh(name):
    key = name.removesuffix("_weight")
    default = {"codebook_weight": 1.0, "commitment": 0.25, "kohonen_weight": 1.0}[name]
    usual, heavier = build(grid=[3])(LATENTS).losses, build(grid=[3], **{name: 3 * default})(LATENTS).losses
    for loss in usual:
        assert float(heavier[loss].detach()) == pytest.approx((3 if loss == key else 1) * float(usual[loss].detach()))


def test_codes_of_length_1_are_pulled_on_the_sphere():
    torch.manual_seed(0)
    quantizer = build(5 * torch.randn(2, 6, 4), normalise="l2")
    out = quantizer(3 * torch.randn(30, 8))
    torch.testing.assert_close(quantizer.codebook().norm(dim=-1), torch.ones(2, 6))
    torch.testing.assert_close(out.vectors.detach().reshape(30, 2, 4).norm(dim=-1), torch.ones(30, 2))
    out.losses["kohonen"].backward()
    weight = quantizer.code_vectors.weight
    along = (weight.grad * weight).sum(dim=-1)  # moving along its own direction would change nothing
    torch.testing.assert_close(along, torch.zeros(2, 6), atol=1e-5, rtol=0)


def test_training_orders_the_map():
    """Codes that begin in no order lie in the order of the grid after gradient steps on the three losses alone."""
    torch.manual_seed(0)
    quantizer = build(torch.randn(1, 25, 2), grid=[5, 5], shrink_step=0.02)
    sync = CodebookSync(quantizer)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    before = grid_correlation(quantizer.codebook()[0], quantizer.grid_distance())
    for _ in range(150):
        optimizer.zero_grad()
        sum(quantizer(2 * torch.rand(200, 2) - 1).losses.values()).backward()
        optimizer.step()
        sync.step()
    after = grid_correlation(quantizer.codebook()[0], quantizer.grid_distance())
    assert abs(before) < 0.3 < 0.6 < after


def test_codes_set_from_latents_lie_on_the_grid_in_order():
    quantizer = build(torch.zeros(1, 24, 2), grid=[6, 4])
    places = torch.cartesian_prod(torch.arange(6.0), torch.arange(4.0) * 3)[torch.randperm(24)].unsqueeze(0)
    quantizer.set_codebook(places, torch.ones(1, 24))
    in_order = torch.cartesian_prod(torch.arange(4.0) * 3, torch.arange(6.0)).flip(1)
    assert torch.equal(quantizer.codebook()[0], in_order)


def test_it_says_of_its_map_what_ksom_says():
    maps = [build_quantizer({"kind": kind, "dim": 2, "codes": 12}) for kind in ("gd_som", "ksom")]
    first, second = torch.tensor([0, 0, 0, 5, 3]), torch.tensor([1, 4, 2, 5, 4])
    assert maps[0].grid == maps[1].grid == (3, 4)
    assert torch.equal(maps[0].grid_distance(), maps[1].grid_distance())
    assert torch.equal(maps[0].are_neighbours(first, second), maps[1].are_neighbours(first, second))
    assert maps[0].compares_latents


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (3, 5)}, r"grid=\[3, 5\] holds 15 codes, codes=64: .*such as \[8, 8\]"),
        ({"grid": ()}, r"grid=\[\] has a side below 1"),
        ({"neighbourhood": "square"}, "'none', 'hard', 'gaussian' or 'exponential'"),
        ({"kohonen_weight": -1}, "kohonen_weight"),
        ({"base": 0}, "base"),
        ({"decay": 0.9}, "decay"),
        ({"replace_after": 10}, "replace_after"),
        ({"dim": 10, "groups": 3}, "groups=3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        GDSOMConfig(**{"codes": 64, **options})
