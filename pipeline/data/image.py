"""Images from bytes to pixels, and the crop that the model sees.

In: the bytes of a JPEG or PNG file and a generator. Out: float32 ``(3, size, size)`` in [0, 1]. torchvision decodes,
without the interpreter's lock; what it refuses (CMYK and other rarities) goes to Pillow.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.data.audio import DecodeError
from pipeline.data.augmentation import erase_, rand_augment
from pipeline.data.config import DataConfig
from pipeline.data.rgb import to_rgb

CROP_ATTEMPTS = 10  # torchvision's


def decode_image(content: bytes) -> Tensor:
    """Decode to RGB: uint8 ``(3, height, width)``; transparent pixels show white. Raises :class:`DecodeError`."""
    if content[:2] == b"\xff\xd8":
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # Pillow knows more dialects, and says what is wrong with the rest
    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous()
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise DecodeError(f"not decodable as an image: {error}") from error


def view_image(
    pixels: Tensor, data: DataConfig, generator: np.random.Generator | None, out: Tensor | None = None
) -> Tensor:
    """Resize, crop, mirror and augment by ``data``: uint8 ``(3, height, width)`` → float32 ``(3, image_size,
    image_size)`` in [0, 1], written into ``out`` if it is given.

    The shorter side becomes ``data.resize`` (or ``image_size``), or with ``fit: stretch`` both sides ``image_size``,
    antialiased. With a generator the crop's place and the mirroring are drawn where ``data`` asks for it; without one
    it is the centre crop of evaluation. With ``data.crop_scale`` and a generator a part of the whole image is drawn and
    resized instead. RandAugment and erasing follow, with a generator alone.
    """
    side = data.image_size
    if generator is not None and data.crop_scale is not None:
        top, left, height, width = _draw_part(pixels.shape[1], pixels.shape[2], data, generator)
        pixels = pixels[:, top : top + height, left : left + width]
        return _finish(_resized(pixels, side, side), data, generator, out)
    shorter = data.resize or side
    height, width = pixels.shape[1:]
    if data.fit == "stretch":
        height, width = side, side
    elif min(height, width) != shorter:
        scale = shorter / min(height, width)
        height, width = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    pixels = _resized(pixels, height, width)
    top, left = (height - side) // 2, (width - side) // 2
    if generator is not None and data.random_crop:
        top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
    return _finish(pixels[:, top : top + side, left : left + side], data, generator, out)


def _draw_part(height: int, width: int, data: DataConfig, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of ``data.crop_scale`` of the area, of a shape within ``data.crop_ratio``:
    the distribution of torchvision's RandomResizedCrop (Szegedy et al., arXiv 1409.4842, section 6)."""
    assert data.crop_scale is not None
    least, most = data.crop_ratio
    for _ in range(CROP_ATTEMPTS):
        area = height * width * generator.uniform(*data.crop_scale)
        ratio = math.exp(generator.uniform(math.log(least), math.log(most)))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(generator.integers(height - high + 1)), int(generator.integers(width - wide + 1)), high, wide
    # The largest part from the middle of a shape that is allowed.
    wide, high = min(width, round(height * most)), min(height, round(width / least))
    wide, high = max(wide, 1), max(high, 1)
    return (height - high) // 2, (width - wide) // 2, high, wide


def _resized(pixels: Tensor, height: int, width: int) -> Tensor:
    if pixels.shape[1:] == (height, width):
        return pixels
    # As bytes: no value is off by more than the one level that rounding takes, and it costs a fifth of the time.
    return functional.interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True)[0]


def _finish(view: Tensor, data: DataConfig, generator: np.random.Generator | None, out: Tensor | None) -> Tensor:
    if generator is None:
        return torch.div(view.contiguous(), 255, out=out)
    if data.flip and generator.random() < 0.5:
        view = view.flip(2)
    # Behind the other draws: with and without these options an image has the same crop.
    view = rand_augment(view.contiguous(), data.rand_augment, data.rand_augment_magnitude, generator)
    pixels = torch.div(view, 255, out=out)
    erase_(pixels, data.erasing, generator)
    return pixels
