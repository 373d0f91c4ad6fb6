"""What is done to a training image beyond crop and mirroring: RandAugment and random erasing.

In: an image and the generator of its sample, which makes every draw: the same bits in any thread and on any rank. Out:
an image of the same shape and type. torchvision's operations do the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

STRONGEST = 30  # the magnitude that magnitudes are counted by
FARTHEST = 150 / 331  # a translation, of the side
ERASED_SHARE = (0.02, 1 / 3)  # of the area, least and most
ERASED_RATIO = (0.3, 1 / 0.3)  # of height over width
ERASING_ATTEMPTS = 10
NOISE_MEAN, NOISE_DEVIATION = 0.45, 0.225  # of ImageNet's pixels, over all three channels


class Operation(NamedTuple):
    """One of RandAugment's: ``apply`` takes uint8 ``(3, height, width)`` and a strength from 0 to 1, below 0 for the
    opposite direction, which is drawn if it is ``signed``."""

    apply: Callable[[Tensor, float], Tensor]
    signed: bool


# Table and strengths of torchvision's RandAugment: the nearest pixel is taken, what comes in from outside is black. At
# the strongest, a shear moves pixels by .3 of their distance from the edge, a translation by 150 / 331 of the side, a
# rotation is by 30 degrees, the four factors are .1 or 1.9, 4 of 8 bits are left and everything is solarised.
OPERATIONS = {
    "Identity": Operation(lambda pixels, _: pixels, False),
    "ShearX": Operation(lambda pixels, strength: _sheared(pixels, [_shear_angle(strength), 0.0]), True),
    "ShearY": Operation(lambda pixels, strength: _sheared(pixels, [0.0, _shear_angle(strength)]), True),
    "TranslateX": Operation(lambda pixels, strength: _moved(pixels, 0, FARTHEST * pixels.shape[2] * strength), True),
    "TranslateY": Operation(lambda pixels, strength: _moved(pixels, FARTHEST * pixels.shape[1] * strength, 0), True),
    "Rotate": Operation(lambda pixels, strength: functional.rotate(pixels, 30 * strength), True),
    "Brightness": Operation(lambda pixels, strength: functional.adjust_brightness(pixels, 1 + 0.9 * strength), True),
    "Color": Operation(lambda pixels, strength: functional.adjust_saturation(pixels, 1 + 0.9 * strength), True),
    "Contrast": Operation(lambda pixels, strength: functional.adjust_contrast(pixels, 1 + 0.9 * strength), True),
    "Sharpness": Operation(lambda pixels, strength: _sharpened(pixels, 1 + 0.9 * strength), True),
    "Posterize": Operation(lambda pixels, strength: functional.posterize(pixels, round(8 - 4 * strength)), False),
    "Solarize": Operation(lambda pixels, strength: functional.solarize(pixels, 255 * (1 - strength)), False),
    "AutoContrast": Operation(lambda pixels, _: functional.autocontrast(pixels), False),
    "Equalize": Operation(lambda pixels, _: functional.equalize(pixels), False),
}
_TABLE = tuple(OPERATIONS.values())


def rand_augment(pixels: Tensor, operations: int, magnitude: float, generator: np.random.Generator) -> Tensor:
    """RandAugment (Cubuk et al., arXiv 1909.13719): so many operations one after the other, each drawn from
    :data:`OPERATIONS` with equal probability, all of ``magnitude`` of 30, signed ones in either direction.

    uint8 ``(3, height, width)`` → the same.
    """
    for _ in range(operations):
        operation = _TABLE[int(generator.integers(len(_TABLE)))]
        strength = magnitude / STRONGEST
        if operation.signed and generator.random() < 0.5:
            strength = -strength
        pixels = operation.apply(pixels, strength)
    return pixels


def erase_(pixels: Tensor, probability: float, generator: np.random.Generator) -> None:
    """Random erasing (Zhong et al., arXiv 1708.04896) with timm's limits: with ``probability`` a rectangle of 2–33 % of
    the area, height over width .3–3.3, becomes noise, drawn for each pixel and channel.

    ``pixels`` is float32 ``(3, height, width)`` in [0, 1]. timm draws the noise from N(0, 1) after normalisation; here
    it is N(.45, .225²), the same for a model that normalises by ImageNet's pixels, clamped to [0, 1].
    """
    if generator.random() >= probability:
        return
    height, width = pixels.shape[1:]
    for _ in range(ERASING_ATTEMPTS):
        area = height * width * generator.uniform(*ERASED_SHARE)
        ratio = math.exp(generator.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < high < height and 0 < wide < width:
            top, left = int(generator.integers(height - high + 1)), int(generator.integers(width - wide + 1))
            noise = torch.from_numpy(generator.standard_normal((len(pixels), high, wide), dtype=np.float32))
            erased = noise.mul_(NOISE_DEVIATION).add_(NOISE_MEAN).clamp_(0, 1)
            pixels[:, top : top + high, left : left + wide] = erased
            return


def _shear_angle(strength: float) -> float:
    return math.degrees(math.atan(0.3 * strength))


def _sheared(pixels: Tensor, angles: list[float]) -> Tensor:
    return functional.affine(pixels, angle=0.0, translate=[0, 0], scale=1.0, shear=angles, center=[0, 0])


def _moved(pixels: Tensor, down: float, right: float) -> Tensor:
    """Moved by whole pixels: what ``affine`` does in forty times the time."""
    return functional.crop(pixels, -int(down), -int(right), *pixels.shape[1:])


def _sharpened(pixels: Tensor, factor: float) -> Tensor:
    # Channels as grey images of a batch: the same bits in a third of the time of a convolution by channel.
    return functional.adjust_sharpness(pixels[:, None], factor)[:, 0]
