"""Images from bytes to pixels, and the crop that the model sees.

In: the bytes of a JPEG or PNG file and a generator. Out: float32 ``(3, size, size)`` in [0, 1]. torchvision decodes,
without the interpreter's lock; what it refuses (CMYK and other rarities) goes to Pillow.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.data.audio import DecodeError
from pipeline.data.config import DataConfig
from pipeline.data.rgb import to_rgb


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
    """Resize, crop and mirror by ``data``: uint8 ``(3, height, width)`` → float32 ``(3, image_size, image_size)`` in
    [0, 1], written into ``out`` if it is given.

    The shorter side becomes ``data.resize`` (or ``image_size``), or with ``fit: stretch`` both sides ``image_size``,
    antialiased. With a generator the crop's place and the mirroring are drawn where ``data`` asks for it; without one
    it is the centre crop of evaluation.
    """
    side = data.image_size
    shorter = data.resize or side
    height, width = pixels.shape[1:]
    if data.fit == "stretch":
        height, width = side, side
    elif min(height, width) != shorter:
        scale = shorter / min(height, width)
        height, width = max(shorter, round(height * scale)), max(shorter, round(width * scale))
    if pixels.shape[1:] != (height, width):
        # As bytes: no value is off by more than the one level that rounding takes, and it costs a fifth of the time.
        pixels = functional.interpolate(pixels[None], size=(height, width), mode="bilinear", antialias=True)[0]
    top, left = (height - side) // 2, (width - side) // 2
    if generator is not None and data.random_crop:
        top, left = int(generator.integers(height - side + 1)), int(generator.integers(width - side + 1))
    view = pixels[:, top : top + side, left : left + side]
    if generator is not None and data.flip and generator.random() < 0.5:
        view = view.flip(2)
    return torch.div(view.contiguous(), 255, out=out)
