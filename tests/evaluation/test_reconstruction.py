"""PSNR, SSIM and MS-SSIM against their definitions, over sets of unequal batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d

from pipeline.evaluation.reconstruction import SMALLEST_MULTI_SCALE_SIDE, ImageQuality


def reference_ssim(first: Tensor, second: Tensor, luminance: bool = True) -> float:
    """Wang et al. 2004: Gaussian window of 11 × 11, sigma 1.5, constants (0.01, 0.03)², over whole windows only."""
    places = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(places**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(3, 1, 11, 11)

    def blur(image: Tensor) -> Tensor:
        return conv2d(image.double(), window, groups=3)

    mean_a, mean_b = blur(first), blur(second)
    variance_a, variance_b = blur(first.double() ** 2) - mean_a**2, blur(second.double() ** 2) - mean_b**2
    covariance = blur(first.double() * second.double()) - mean_a * mean_b
    similarity = (2 * covariance + 0.03**2) / (variance_a + variance_b + 0.03**2)
    if luminance:
        similarity *= (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
    return float(similarity.mean())


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(5, 3, 32, 32, generator=generator)
    return originals, (originals + 0.1 * torch.randn(5, 3, 32, 32, generator=generator)).clamp(0, 1)


def test_psnr_by_hand() -> None:
    quality = ImageQuality()
    quality.add(torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.6))
    quality.add(torch.full((3, 3, 16, 16), 0.5), torch.full((3, 3, 16, 16), 0.5))
    result = quality.compute()
    assert result["mse"] == pytest.approx(0.01 / 4, rel=1e-5)
    assert result["psnr"] == pytest.approx(-10 * math.log10(0.01 / 4), rel=1e-5)


def test_ssim_is_that_of_the_definition(pair: tuple[Tensor, Tensor]) -> None:
    originals, reconstructions = pair
    quality = ImageQuality()
    quality.add(originals, reconstructions)
    assert quality.compute()["ssim"] == pytest.approx(reference_ssim(originals, reconstructions), abs=1e-3)


def test_ms_ssim_is_that_of_the_definition() -> None:
    """Wang et al. 2003, over three batches of unlike size: contrast and structure of four scales, likeness of the
    fifth."""
    generator = torch.Generator().manual_seed(2)
    originals = torch.rand(4, 3, 11, 11, generator=generator)
    originals = torch.nn.functional.interpolate(originals, SMALLEST_MULTI_SCALE_SIDE, mode="bicubic").clamp(0, 1)
    reconstructions = (originals + 0.05 * torch.randn(originals.shape, generator=generator)).clamp(0, 1)
    quality = ImageQuality()
    for start, stop in ((0, 1), (1, 3), (3, 4)):
        quality.add(originals[start:stop], reconstructions[start:stop])
    expected = 0.0
    for image, other in zip(originals.split(1), reconstructions.split(1), strict=True):
        value = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            value *= reference_ssim(image, other, luminance=scale == 4) ** weight
            image, other = avg_pool2d(image, 2), avg_pool2d(other, 2)
        expected += value / len(originals)
    result = quality.compute()
    assert result["ms_ssim"] == pytest.approx(expected, abs=2e-3)
    assert result["ms_ssim"] > result["ssim"] + 0.05


def test_unequal_batches_give_what_one_batch_gives(pair: tuple[Tensor, Tensor]) -> None:
    originals, reconstructions = pair
    whole, parts = ImageQuality(), ImageQuality()
    whole.add(originals, reconstructions)
    parts.add(originals[:4], reconstructions[:4])
    parts.add(originals[4:], reconstructions[4:])
    together, apart = whole.compute(), parts.compute()
    assert together.pop("ms_ssim") is apart.pop("ms_ssim") is None
    assert apart == pytest.approx(together, rel=1e-5)


def test_reconstructions_are_clipped_and_originals_checked() -> None:
    quality = ImageQuality()
    quality.add(torch.ones(1, 3, 16, 16), torch.full((1, 3, 16, 16), 1.7))
    assert quality.compute()["mse"] == 0.0
    with pytest.raises(ValueError, match="give originals in"):
        quality.add(torch.full((1, 3, 16, 16), 255.0), torch.ones(1, 3, 16, 16))


def test_small_images_have_no_ssim() -> None:
    quality = ImageQuality()
    quality.add(torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8))
    assert quality.compute()["ssim"] is None
    side = SMALLEST_MULTI_SCALE_SIDE - 1
    quality.add(torch.rand(1, 3, side, side), torch.rand(1, 3, side, side))
    assert quality.compute()["ms_ssim"] is None
    assert quality.compute()["ssim"] is not None
