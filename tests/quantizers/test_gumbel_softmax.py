"""The hard Gumbel softmax against its textbook form, and what it keeps."""

import pytest
import torch

from pipeline.quantizers.gumbel_softmax import draw
from pipeline.quantizers.tiles import TILE_ELEMENTS, gumbel_noise
from tests.quantizers.test_simplex import peak


def problem(tokens=23, groups=2, codes=6, dim=4, code_dim=3):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, groups, dim), (groups, codes, dim), (groups, codes), (groups, codes, code_dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def textbook(latents, weight, bias, codebook, temperature):
    """y = one-hot + soft − sg(soft); the vectors of its codes learn by the one-hot, logits by soft · sg(C)."""
    logits = torch.einsum("tgd,gkd->tgk", latents, weight) + bias
    soft = ((logits + gumbel_noise(logits.new_empty(logits.shape))) / temperature).softmax(dim=-1)
    one_hot = torch.nn.functional.one_hot(soft.argmax(dim=-1), codebook.shape[1]).to(soft)
    vectors = torch.einsum("tgk,gkd->tgd", one_hot, codebook)
    vectors = vectors + torch.einsum("tgk,gkd->tgd", soft - soft.detach(), codebook.detach())
    return vectors, logits.softmax(dim=-1).sum(dim=0), soft.argmax(dim=-1)


def with_gradients(function, inputs, temperature, weights=(1.0, 1.0)):
    torch.manual_seed(3)
    found = function(*inputs, temperature)
    upstream = torch.linspace(-1, 1, found[0].numel(), dtype=torch.float64).reshape(found[0].shape)
    loss = weights[0] * (found[0] * upstream).sum() + weights[1] * found[1].square().sum()
    return *found, *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("tokens", [0, 1, 23, 300])
@pytest.mark.parametrize("codes", [6, 128])  # 128: whole blocks of the argmax
def test_values_and_gradients_are_those_of_the_textbook(tokens, codes):
    inputs, temperature = problem(tokens, codes=codes), torch.tensor(0.7)
    torch.testing.assert_close(with_gradients(draw, inputs, temperature), with_gradients(textbook, inputs, temperature))


@pytest.mark.parametrize("only", [0, 1])
def test_either_output_alone_has_its_gradients(only):
    inputs, temperature = problem(), torch.tensor(2.0)
    torch.manual_seed(3)
    found = draw(*inputs, temperature)[only].square().sum()
    torch.manual_seed(3)
    expected = textbook(*inputs, temperature)[only].square().sum()
    for name, *pair in zip(
        ("latents", "weight", "bias", "codebook"),
        torch.autograd.grad(found, inputs),
        torch.autograd.grad(expected, inputs, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(*pair, msg=name)


@pytest.mark.parametrize("elements", [1, 60])
def test_the_size_of_tiles_is_no_part_of_the_result(monkeypatch, elements):
    inputs, temperature = problem(), torch.tensor(0.7)
    expected = with_gradients(draw, inputs, temperature)
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", elements)
    torch.testing.assert_close(with_gradients(draw, inputs, temperature), expected)


def test_little_more_than_two_tensors_of_tokens_by_codes_are_held():
    """The textbook form holds logits, noise, both softmaxes, their gradients …"""
    tokens, codes = 2048, 1024
    inputs = [tensor.detach().float().requires_grad_() for tensor in problem(tokens, 1, codes)]
    whole, temperature = tokens * codes * 4, torch.tensor(2.0)

    def held(function):
        def vectors_and_loss(*tensors):
            vectors, sums, _ = function(*tensors, temperature)
            return vectors, sums.square().sum()

        return peak(vectors_and_loss, inputs)

    assert 2 * whole < held(draw) < 3 * whole < held(textbook)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_that_of_gumbel(dtype):
    torch.manual_seed(0)
    noise = gumbel_noise(torch.empty(1_000_000, dtype=dtype)).double()
    assert noise.isfinite().all()
    # Gumbel's mean is Euler's constant, its variance π²/6; P(g ≤ x) = exp(−exp(−x))
    assert float(noise.mean()) == pytest.approx(0.577216, abs=0.005)
    assert float(noise.var()) == pytest.approx(1.644934, abs=0.01)
    for quantile in (-1.5, 0.0, 1.0, 4.0, 8.0):
        expected = float(torch.exp(-torch.exp(-torch.tensor(quantile))))
        assert float((noise <= quantile).double().mean()) == pytest.approx(expected, abs=0.002)


def test_a_uniform_number_of_zero_gives_finite_noise(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self: self.zero_())
    assert gumbel_noise(torch.empty(2)).tolist() == pytest.approx([-2.852, -2.852], abs=0.001)
