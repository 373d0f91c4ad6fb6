"""SimVQ: golden values, gradients against autograd's of the formula, and what must not change."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.simvq import SimVQConfig, SimVQQuantizer

LATENTS = torch.tensor([[0.2, 0.0], [0.1, 0.2], [1.1, 0.0]])
FROZEN = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])


def build(**options) -> SimVQQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "simvq", "dim": 2, "codes": 3, **options})
    assert isinstance(quantizer, SimVQQuantizer)
    return quantizer


def test_golden_step():
    """W = 2·I and b = 0 make codes (0,0), (2,0), (0,4); (1.1, 0) is nearest to (2,0). By hand: the sum of squared
    differences is .04 + .05 + .81 = .9, a mean of .15 over six elements; b's gradient is the sum of the differences
    c − z = (−.2,0), (−.1,−.2), (.9,0) by 2/6, W's that of the one code that is not 0 by its frozen vector (1,0)."""
    quantizer = build()
    quantizer.frozen_codes.copy_(FROZEN)
    quantizer.maps[0].weight.data.copy_(2 * torch.eye(2))
    assert torch.equal(quantizer.codebook(), 2 * FROZEN)
    latents = LATENTS.clone().requires_grad_()
    out = quantizer(latents)
    assert out.codes.flatten().tolist() == [0, 0, 1]
    assert torch.equal(out.vectors.detach(), 2 * FROZEN[0, [0, 0, 1]])
    values = {name: float(loss.detach()) for name, loss in out.losses.items()}
    assert values == pytest.approx({"codebook": 0.15, "commitment": 0.25 * 0.15})

    out.losses["codebook"].backward(retain_graph=True)
    assert latents.grad is None
    torch.testing.assert_close(quantizer.maps[0].bias.grad, torch.tensor([0.2, -1 / 15]))
    torch.testing.assert_close(quantizer.maps[0].weight.grad, torch.tensor([[0.3, 0.0], [0.0, 0.0]]))
    quantizer.zero_grad()
    out.losses["commitment"].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    torch.testing.assert_close(latents.grad, 0.25 / 3 * (LATENTS - out.vectors.detach()))
    latents.grad = None
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    (out.vectors * upstream).sum().backward()
    assert torch.equal(latents.grad, upstream)
    assert all(parameter.grad is None for parameter in quantizer.parameters())


@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_gradients_are_those_of_the_formula(normalise):
    """In each group, in float64: mean((sg(z) − (C·Wᵀ + b)_q)²) + 0.25·mean((z − sg(…))²)."""
    quantizer = build(dim=6, codes=9, groups=2, normalise=normalise)
    latents = torch.randn(40, 6).requires_grad_()
    out = quantizer(latents)
    sum(out.losses.values()).backward()

    exact = latents.detach().double().requires_grad_()
    weights = [linear.weight.detach().double().requires_grad_() for linear in quantizer.maps]
    biases = [linear.bias.detach().double().requires_grad_() for linear in quantizer.maps]
    codebook = [quantizer.frozen_codes[g].double() @ weights[g].T + biases[g] for g in range(2)]
    parts = list(exact.split(3, dim=-1))
    if normalise == "l2":
        codebook = [functional.normalize(codes, dim=-1) for codes in codebook]
        parts = [functional.normalize(part, dim=-1) for part in parts]
    nearest = [torch.cdist(parts[g], codebook[g]).argmin(dim=-1) for g in range(2)]
    assert torch.equal(out.codes, torch.stack(nearest, dim=-1))
    vectors, compared = torch.cat([codebook[g][nearest[g]] for g in range(2)], dim=-1), torch.cat(parts, dim=-1)
    codebook_loss = (compared.detach() - vectors).square().mean()
    commitment = 0.25 * (compared - vectors.detach()).square().mean()
    (codebook_loss + commitment).backward()

    torch.testing.assert_close(out.losses["codebook"].double(), codebook_loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(out.losses["commitment"].double(), commitment, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(latents.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)
    for group, linear in enumerate(quantizer.maps):
        torch.testing.assert_close(linear.weight.grad.double(), weights[group].grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(linear.bias.grad.double(), biases[group].grad, rtol=1e-4, atol=1e-7)


def test_frozen_codes_have_length_1_on_average_and_are_no_parameter():
    quantizer = build(dim=64, codes=4096, groups=2)
    assert quantizer.frozen_codes.square().sum(dim=-1).mean() == pytest.approx(1.0, abs=0.02)
    assert {name for name, _ in quantizer.named_parameters()} == {
        f"maps.{group}.{name}" for group in range(2) for name in ("weight", "bias")
    }
    assert "frozen_codes" in quantizer.state_dict()
    weight = torch.cat([linear.weight.detach() for linear in quantizer.maps])
    assert 0.99 * 32**-0.5 < float(weight.abs().max()) <= 32**-0.5
    assert not any(bool(linear.bias.detach().any()) for linear in quantizer.maps)


def test_every_code_moves_with_the_tokens_of_one():
    """What SimVQ is for: all latents choose one code, and the others move with it."""
    quantizer = build(dim=4, codes=32)
    sync = CodebookSync(quantizer)
    frozen, before = quantizer.frozen_codes.clone(), quantizer.codebook().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    out = quantizer(before[0, 5].expand(20, 4) * 1.01)
    assert out.usage[0].nonzero().flatten().tolist() == [5]
    out.losses["codebook"].backward()
    optimizer.step()
    sync.step()
    assert bool((quantizer.codebook() != before).any(dim=-1).all())
    assert torch.equal(quantizer.frozen_codes, frozen)


def test_training_uses_more_codes_than_learned_codes_do():
    """Latents far from where codes start: codes of their own are lost for good, codes that share a map are not."""
    used = {}
    for kind in ("ste", "simvq"):
        torch.manual_seed(0)
        quantizer = build_quantizer({"kind": kind, "dim": 4, "codes": 64})
        sync = CodebookSync(quantizer)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            sum(quantizer(torch.randn(256, 4) + 5).losses.values()).backward()
            optimizer.step()
            sync.step()
        used[kind] = int((quantizer.eval()(torch.randn(4096, 4) + 5).usage > 0).sum())
    assert used["simvq"] > 2 * used["ste"]


def test_codes_that_share_a_map_can_not_be_set():
    quantizer = build()
    with pytest.raises(ValueError, match="simvq has no codes that can be set from latents"):
        quantizer.set_codebook(FROZEN)
    with pytest.raises(ValueError, match="simvq has no codes that k-means can set"):
        initialise_codebooks(quantizer, [LATENTS])


@pytest.mark.parametrize("name", ["codebook_weight", "commitment"])
def test_weights_weigh(name):
    key, default = name.removesuffix("_weight"), {"codebook_weight": 1.0, "commitment": 0.25}[name]
    usual, heavier = build()(LATENTS).losses, build(**{name: 3 * default})(LATENTS).losses
    for loss in usual:
        assert float(heavier[loss].detach()) == pytest.approx((3 if loss == key else 1) * float(usual[loss].detach()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"commitment": -0.1}, "commitment"),
        ({"codebook_weight": -1}, "codebook_weight"),
        ({"replace_after": 10}, "replace_after"),
        ({"decay": 0.9}, "decay"),
        ({"normalise": "max_norm"}, "normalise"),
        ({"dim": 10, "groups": 3}, "groups=3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        SimVQConfig(**{"codes": 64, **options})
