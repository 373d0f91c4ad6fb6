"""The fused mixtures against the textbook form: values, gradients, ties, and what they keep in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from pipeline.quantizers import simplex
from pipeline.quantizers.simplex import Mixtures, Neighbourhood, mix, nearest_tokens
from pipeline.quantizers.tiles import TILE_ELEMENTS, Tiles, gumbel_noise

GOLDEN = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])


def problem(tokens: int = 23, groups: int = 2, codes: int = 6) -> list[Tensor]:
    """Float64 latents, weights, biases and codes, all to be differentiated."""
    generator = torch.Generator().manual_seed(tokens + groups + codes)
    shapes = [(tokens, groups, 4), (groups, codes, 4), (groups, codes), (groups, codes, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def textbook(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor,
    codebook: Tensor,
    neighbourhood: Neighbourhood,
    noise: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors, loss, codes and mean as autograd would be given them; ``noise (tokens, groups, codes)`` on logits."""
    logits = torch.einsum("tgd,gkd->tgk", latents, weight) + bias + noise
    log_mixtures = logits.log_softmax(dim=-1)
    mixtures = log_mixtures.exp()
    if neighbourhood.distance == "cross_entropy":
        distances = -log_mixtures
    else:
        vertices = torch.eye(logits.shape[-1], dtype=logits.dtype)
        distances = (vertices - mixtures.unsqueeze(-2)).square().sum(dim=-1)
    neighbours = min(neighbourhood.neighbours, len(latents))
    loss = distances.sort(dim=0, stable=True).values[:neighbours].sum()
    loss = loss / max(1, logits[0].numel() * neighbours) if len(latents) else loss
    mean = mixtures.sum(dim=0) / max(1, len(latents))
    return torch.einsum("tgk,gkd->tgd", mixtures, codebook), loss, logits.argmax(dim=-1), mean


def gradients(vectors: Tensor, loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 1, vectors.numel(), dtype=vectors.dtype).reshape(vectors.shape)
    return torch.autograd.grad((vectors * upstream).sum() + 3 * loss, inputs)


@pytest.mark.parametrize("distance", ["l2", "cross_entropy"])
@pytest.mark.parametrize("neighbours", [1, 2, 5, 40])  # 40: more than there are tokens
@pytest.mark.parametrize("codes", [6, 128])
@pytest.mark.parametrize("tokens", [0, 1, 23, 300])
def test_values_and_gradients_are_those_of_the_textbook(distance, neighbours, codes, tokens):
    inputs, neighbourhood = problem(tokens, 2, codes), Neighbourhood(neighbours, distance)
    found, expected = mix(*inputs, neighbourhood), textbook(*inputs, neighbourhood)
    torch.testing.assert_close(tuple(found[:4]), expected)
    assert found.total == tokens
    torch.testing.assert_close(gradients(found[0], found[1], inputs), gradients(*expected[:2], inputs))


@pytest.mark.parametrize("distance", ["l2", "cross_entropy"])
def test_noise_is_drawn_once_and_is_that_of_gumbel(distance):
    inputs, neighbourhood = problem(), Neighbourhood(2, distance)
    torch.manual_seed(1)
    found = mix(*inputs, neighbourhood, noise=0.5)
    torch.manual_seed(1)
    rows = Tiles(torch.empty(0), 23, 6, 1).rows
    parts = [part.shape for part in torch.empty(23, 6).split(rows)]
    drawn = [[gumbel_noise(torch.empty(shape, dtype=torch.float64)) for shape in parts] for _group in range(2)]
    noise = 0.5 * torch.stack([torch.cat(of_group) for of_group in drawn], dim=1)
    expected = textbook(*inputs, neighbourhood, noise)
    torch.testing.assert_close(tuple(found[:4]), expected)
    torch.testing.assert_close(gradients(found[0], found[1], inputs), gradients(*expected[:2], inputs))


@pytest.mark.parametrize(
    ("distance", "neighbours", "noise"),
    [*itertools.product(["l2", "cross_entropy"], [1, 3], [0.0]), ("cross_entropy", 2, 0.5)],
)
def test_gradients_are_those_of_finite_differences(distance, neighbours, noise):
    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        found = mix(*inputs, Neighbourhood(neighbours, distance), noise=noise)
        return found.vectors, found.loss

    assert torch.autograd.gradcheck(function, problem(9, 2, 4))


@pytest.mark.parametrize("needed", range(4))
def test_one_input_alone_gets_its_gradient(needed):
    inputs, neighbourhood = problem(), Neighbourhood(2, "l2")
    expected = gradients(*textbook(*inputs, neighbourhood)[:2], inputs)[needed]
    alone = [tensor.detach().requires_grad_(place == needed) for place, tensor in enumerate(inputs)]
    found = mix(*alone, neighbourhood)
    torch.testing.assert_close(gradients(found.vectors, found.loss, [alone[needed]])[0], expected)


@pytest.mark.parametrize("distance", ["l2", "cross_entropy"])
def test_vectors_or_the_loss_alone_can_be_differentiated(distance):
    inputs, neighbourhood = problem(), Neighbourhood(2, distance)
    for place in (0, 1):
        found, expected = mix(*inputs, neighbourhood)[place].sum(), textbook(*inputs, neighbourhood)[place].sum()
        torch.testing.assert_close(
            torch.autograd.grad(found, inputs, materialize_grads=True),
            torch.autograd.grad(expected, inputs, materialize_grads=True),
        )


def test_far_tokens_are_pulled_where_their_probability_is_zero_in_fp32():
    """−log p from log-softmax: p itself is 0 here, and its logarithm would be infinite."""
    latents = torch.tensor([[[0.0, 500.0]], [[0.0, 400.0]]], requires_grad=True)
    found = mix(latents, torch.eye(2)[None], torch.zeros(1, 2), torch.eye(2)[None], Neighbourhood(1, "cross_entropy"))
    assert float(found.loss.detach()) == pytest.approx((400 + 0) / 2)
    found.loss.backward()
    torch.testing.assert_close(latents.grad, torch.tensor([[[0.0, 0.0]], [[-0.5, 0.5]]]))


def cloud(mixtures: Tensor, distance: simplex.Distance, neighbours: int) -> Mixtures:
    """The fused function on given mixtures ``(tokens, codes)``."""
    codes = mixtures.shape[1]
    logits = mixtures.log().clamp(min=-1e4).unsqueeze(1)
    codebook = torch.eye(codes)[None]
    return mix(logits, codebook, torch.zeros(1, codes), codebook, Neighbourhood(neighbours, distance))


@pytest.mark.parametrize(
    ("distance", "neighbours", "value"),
    [("l2", 1, 0.246667), ("l2", 2, 0.5), ("cross_entropy", 1, 0.498703), ("cross_entropy", 2, 0.918915)],
)
def test_golden_values(distance, neighbours, value):
    """Section 4.5 of the specification."""
    found = cloud(GOLDEN, distance, neighbours)
    assert float(found.loss) == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(found.vectors[:, 0], GOLDEN)
    assert found.codes[:, 0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("distance", "neighbours", "tokens"),
    [
        ("l2", 1, [[0], [2], [3]]),
        ("cross_entropy", 1, [[0], [2], [3]]),
        ("l2", 2, [[0, 1], [2, 3], [3, 1]]),
        ("cross_entropy", 2, [[0, 1], [2, 1], [3, 0]]),  # tokens 1 and 3 tie at .3, and 0, 1 and 2 at .1
    ],
)
def test_golden_neighbours(distance, neighbours, tokens):
    squares = GOLDEN.square().sum(dim=1) if distance == "l2" else None
    assert nearest_tokens(GOLDEN.log(), squares, neighbours)[1].tolist() == tokens


def test_it_tells_clouds_apart_that_have_the_same_mean():
    """Figure 1b of the paper: all of these have a mean perplexity of 3, which a perplexity loss can't tell apart."""
    assert float(cloud(torch.eye(3).repeat(1000, 1), "l2", 8).loss) == 0
    assert float(cloud(torch.eye(3)[[0]].expand(3000, 3), "l2", 8).loss) == pytest.approx(4 / 3)
    torch.manual_seed(0)
    values = []
    for alpha in (0.05, 0.5, 1.0, 2.0, 50.0):
        sample = torch.distributions.Dirichlet(torch.full((3,), alpha)).sample((3000,))
        values.append(float(cloud(sample, "l2", 8).loss))
    assert values == sorted(values)
    assert values[0] < 1e-5
    assert values[2] == pytest.approx(0.0024, rel=0.6)
    assert values[3] == pytest.approx(0.0251, rel=0.4)
    assert values[4] == pytest.approx(0.4501, rel=0.1)


@pytest.mark.parametrize(("tokens", "levels"), [(10, 3), (500, 4), (500, 100), (1024, 10**9)])
@pytest.mark.parametrize("neighbours", [1, 2, 7, 33])
def test_of_equally_near_tokens_the_earlier_is_taken(tokens, levels, neighbours):
    """Few levels make ties in each block of rows and between blocks."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.randint(levels, (tokens, 9), generator=generator).float() / levels
    order = scores.sort(dim=0, descending=True, stable=True)
    found, places = nearest_tokens(scores, None, neighbours)
    assert torch.equal(found.T, order.values[:neighbours])
    assert torch.equal(places.T, order.indices[:neighbours])


@pytest.mark.parametrize("elements", [1, 60, 1 << 21])
def test_the_size_of_tiles_is_no_part_of_the_result(monkeypatch, elements):
    inputs, neighbourhood = problem(), Neighbourhood(3, "l2")
    expected = textbook(*inputs, neighbourhood)
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", elements)
    found = mix(*inputs, neighbourhood)
    torch.testing.assert_close(tuple(found[:4]), expected)
    torch.testing.assert_close(gradients(found[0], found[1], inputs), gradients(*expected[:2], inputs))


def peak(function, inputs: list[Tensor]) -> int:
    """Most bytes that a forward and a backward hold at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        found = function(*inputs)
        gradients(found[0], found[1], inputs)
        del found
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


@pytest.mark.parametrize("distance", ["l2", "cross_entropy"])
@pytest.mark.parametrize(("noise", "neighbours"), [(0.0, 2), (0.5, 2), (0.0, 40)])
def test_no_more_than_two_tensors_of_tokens_by_codes_are_ever_held(distance, noise, neighbours):
    """Defect of the textbook form: logits, log p, p, distances and a gradient of each."""
    tokens, codes = 2048, 1024
    inputs = [tensor.detach().float().requires_grad_() for tensor in problem(tokens, 1, codes)]
    whole = tokens * codes * 4
    neighbourhood = Neighbourhood(neighbours, distance)
    assert whole < peak(lambda *tensors: mix(*tensors, neighbourhood, noise=noise), inputs) < 2 * whole
    few = [inputs[0][:256].detach().requires_grad_(), *inputs[1:]]  # the textbook's squared distance is cubic
    if distance == "cross_entropy":
        assert peak(lambda *tensors: textbook(*tensors, neighbourhood), few) > 3 * whole / 8
