"""The rotation trick: published values, the gradient against an explicit rotation matrix, vectors without direction."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.rotation import RotationConfig, RotationQuantizer, rotate_to_codes


def build(**options) -> RotationQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "rotation", **options})
    assert isinstance(quantizer, RotationQuantizer)
    return quantizer


def rotation_matrix(latent: Tensor, code: Tensor) -> Tensor:
    """The rotation in the plane of the two that turns one's direction to the other's: ``(dim,)`` each → ``(dim, dim)``.

    From the cosine and sine of the angle, not by the paper's reflections.
    """
    first, target = latent / latent.norm(), code / code.norm()
    cosine = first @ target
    second = target - cosine * first
    sine = second.norm()
    second = second / sine
    plane = torch.stack([first, second], dim=1)  # (dim, 2)
    turn = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
    return torch.eye(len(latent), dtype=latent.dtype) - plane @ plane.T + plane @ turn @ plane.T


def gradient_of(latent: Tensor, code: Tensor, upstream: Tensor) -> Tensor:
    latent = latent.clone().requires_grad_()
    vectors = rotate_to_codes(latent, code)
    assert torch.equal(vectors.detach(), code)
    (gradient,) = torch.autograd.grad(vectors, latent, upstream)
    return gradient


def test_golden_value():
    latent, code, upstream = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 10.0]), torch.tensor([1.0, 2.0])
    torch.testing.assert_close(gradient_of(latent, code, upstream), torch.tensor([4.0, 2.0]))


@pytest.mark.parametrize("dim", [2, 3, 7])
def test_the_gradient_is_that_of_the_rotated_and_scaled_latent(dim):
    """Autograd through (|c| / |z|)·R·z with R and the ratio held, in float64, token by token."""
    generator = torch.Generator().manual_seed(dim)
    latents, codes, upstream = (torch.randn(20, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = []
    for latent, code, of_output in zip(latents, codes, upstream, strict=True):
        leaf = latent.clone().requires_grad_()
        matrix = rotation_matrix(latent, code) * (code.norm() / latent.norm())
        torch.testing.assert_close(matrix @ latent, code)
        (matrix @ leaf @ of_output).backward()
        expected.append(leaf.grad)
    torch.testing.assert_close(gradient_of(latents, codes, upstream), torch.stack(expected))


def test_angles_between_gradient_and_vector_are_kept():
    """What the trick is for: the gradient lies to the latent as it lies to the code; lengths grow with |c| / |z|."""
    generator = torch.Generator().manual_seed(0)
    latents, codes, upstream = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    gradient = gradient_of(latents, codes, upstream)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(gradient, latents), cosine(upstream, codes))
    ratio = codes.norm(dim=1) / latents.norm(dim=1)
    torch.testing.assert_close(gradient.norm(dim=1), ratio * upstream.norm(dim=1))


def test_vectors_without_a_direction_give_finite_gradients():
    upstream = torch.tensor([1.0, 2.0, 3.0])
    some, none = torch.tensor([0.0, 2.0, 0.0]), torch.zeros(3)
    assert torch.equal(gradient_of(none, some, upstream), upstream)  # straight through
    assert torch.equal(gradient_of(none, none, upstream), upstream)
    assert torch.equal(gradient_of(some * 1e-20, some, upstream), upstream)
    assert torch.equal(gradient_of(some, none, upstream), none)
    # Opposite: any half turn will do; this one turns the plane of z alone.
    torch.testing.assert_close(gradient_of(some, -3 * some, upstream), 3 * torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(gradient_of(some, 3 * some, upstream), 3 * upstream)


def test_groups_are_turned_by_themselves():
    quantizer = build(dim=8, codes=16, groups=2)
    latents, upstream = torch.randn(30, 8), torch.randn(30, 8)
    leaf = latents.clone().requires_grad_()
    out = quantizer(leaf)
    (gradient,) = torch.autograd.grad(out.vectors, leaf, upstream)
    for group in range(2):
        part = slice(4 * group, 4 * group + 4)
        chosen = quantizer.codebook()[group][out.codes[:, group]]
        assert torch.equal(out.vectors[:, part].detach(), chosen)
        expected = gradient_of(latents[:, part], chosen, upstream[:, part])
        torch.testing.assert_close(gradient[:, part], expected)


def test_everything_but_the_gradient_is_emas():
    """Codes and the codebook after steps with replacement are those of kind ema, bit for bit; the loss is too, but for
    the order of its sum."""
    options = {"dim": 6, "codes": 12, "groups": 2, "decay": 0.8, "replace_after": 2}
    states, outputs = [], []
    for kind in ("rotation", "ema"):
        torch.manual_seed(0)
        quantizer = build_quantizer({"kind": kind, **options})
        sync = CodebookSync(quantizer)
        for step in range(5):
            latents = torch.randn(20, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()
            out = quantizer(latents)
            out.losses["commitment"].backward()
            states.append((out.vectors.detach(), out.codes))
            outputs.append((out.losses["commitment"].detach(), latents.grad))
            sync.step()
        states.append(tuple(quantizer.state_dict().values()))
    torch.testing.assert_close(states[:6], states[6:], rtol=0, atol=0)
    torch.testing.assert_close(outputs[:5], outputs[5:])


def test_codes_get_no_gradient():
    assert not list(build(dim=4, codes=8).parameters())


def test_no_matrix_a_token():
    """2,048 tokens of 64 features: nothing in forward and backward is larger than the tokens themselves."""
    latents, codes = torch.randn(2048, 64, requires_grad=True), torch.randn(2048, 64)
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Largest():
        rotate_to_codes(latents, codes).sum().backward()
    assert largest == latents.numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.0}, "decay"),
        ({"replace_after": 1}, "replace_after=1 would move every code"),
        ({"normalise": "max_norm"}, "normalise"),
        ({"grid": [8, 8]}, "grid"),
        ({"dim": 10, "groups": 3}, "groups=3"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        RotationConfig(**{"codes": 64, **options})
