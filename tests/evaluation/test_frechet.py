"""The Fréchet distance against closed forms and torchmetrics, and the untrained network it is taken by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from torchmetrics.image.fid import FrechetInceptionDistance

from pipeline.evaluation.frechet import FrechetDistance, RandomFeatures, gaussian_distance


class Flat(nn.Module):
    """Pixels of a small thumbnail as features; torchmetrics takes it for its own network."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return avg_pool2d(images, 8).flatten(1)


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(40, 3, 16, 16, generator=generator)
    return originals, (0.8 * originals + 0.3 * torch.rand(40, 3, 16, 16, generator=generator)).clamp(0, 1)


def test_distances_of_gaussians_by_hand() -> None:
    """Of commuting covariances: ‖m₁ − m₂‖² + Σ (σ₁ − σ₂)²."""
    zero, mean = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    first, second = torch.tensor([4.0, 1.0, 0.0]).double(), torch.tensor([9.0, 0.25, 2.0]).double()
    expected = 1 + 4 + 0.25 + (2 - 3) ** 2 + (1 - 0.5) ** 2 + 2
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()).Q
    turned = [turn @ torch.diag(variances) @ turn.T for variances in (first, second)]
    assert gaussian_distance(zero, torch.diag(first), mean, torch.diag(second)) == pytest.approx(expected)
    assert gaussian_distance(zero, turned[0], turn @ mean, turned[1]) == pytest.approx(expected)
    # Of two that do not commute, in two dimensions: tr (C₁C₂)^½ = (tr C₁C₂ + 2 (det C₁C₂)^½)^½.
    one, other = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    product = one @ other
    shared = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.det(product))))
    assert gaussian_distance(zero[:2], one, zero[:2], other) == pytest.approx(5 + 6 - 2 * shared)


def test_the_arithmetic_is_that_of_torchmetrics(images: tuple[Tensor, Tensor]) -> None:
    theirs = FrechetInceptionDistance(feature=Flat(), normalize=True, input_img_size=(3, 16, 16)).set_dtype(
        torch.float64
    )
    ours = FrechetDistance(Flat())
    for start, stop in ((0, 7), (7, 40)):
        originals, reconstructions = (each[start:stop].double() for each in images)
        theirs.update(originals, real=True)
        theirs.update(reconstructions, real=False)
        ours.add(originals, reconstructions)
    assert ours.compute() == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_batches_of_any_size_give_one_distance(images: tuple[Tensor, Tensor]) -> None:
    """Also where there are far fewer images than features."""
    few = [each[:9] for each in images]
    whole, parts, equal = (FrechetDistance(RandomFeatures()) for _ in range(3))
    whole.add(*few)
    for place in range(9):
        parts.add(few[0][place : place + 1], few[1][place : place + 1])
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-5)
    equal.add(few[0], few[0])
    assert 0 <= equal.compute() < 1e-6 < whole.compute()


def test_one_image_has_no_distance(images: tuple[Tensor, Tensor]) -> None:
    distance = FrechetDistance(RandomFeatures())
    distance.add(images[0][:1], images[1][:1])
    assert distance.compute() is None


def test_the_untrained_network_is_the_same_everywhere() -> None:
    """Golden values of the first and the last weight: another machine or NumPy that draws others is told apart."""
    network = RandomFeatures()
    weights = [layer.weight for layer in network.layers]
    assert [weight.std().item() / math.sqrt(2 / weight[0].numel()) for weight in weights] == pytest.approx(
        [1] * 4, abs=0.05
    )
    assert weights[0].flatten()[0].item() == pytest.approx(-0.46051812, rel=1e-6)
    assert weights[-1].flatten()[-1].item() == pytest.approx(-0.0525737964, rel=1e-6)
    torch.manual_seed(3)
    assert torch.equal(RandomFeatures().layers[0].weight, weights[0])
    assert not torch.equal(RandomFeatures(seed=1).layers[0].weight, weights[0])


def test_the_untrained_network_tells_more_damage_from_less() -> None:
    """Of smooth images, so that blur is damage: noise, blur and lost contrast, each mild and strong."""
    generator = torch.Generator().manual_seed(4)
    originals = torch.nn.functional.interpolate(torch.rand(24, 3, 12, 12, generator=generator), 48, mode="nearest")
    noise = torch.randn(originals.shape, generator=generator)

    def blur(size: int) -> Tensor:
        return avg_pool2d(originals, size, stride=1, padding=size // 2, count_include_pad=False)

    damages = {
        "noise": [originals + share * noise for share in (0.02, 0.1)],
        "blur": [blur(3), blur(7)],
        "contrast": [0.5 + share * (originals - 0.5) for share in (0.9, 0.6)],
    }
    for name, damaged in damages.items():
        values = []
        for reconstructions in damaged:
            distance = FrechetDistance(RandomFeatures())
            distance.add(originals, reconstructions.clamp(0, 1))
            values.append(distance.compute())
        assert 0 < 2 * values[0] < values[1], name
