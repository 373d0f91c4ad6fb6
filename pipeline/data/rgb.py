"""Any picture as RGB. Apart from the decoders, so that preparation's workers need not load torch for it."""

from __future__ import annotations

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with white behind transparent pixels; of 16 bits the upper eight."""
    if image.mode.startswith("I"):  # Pillow's own conversion would make all above 255 white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        flat = Image.new("RGBA", layered.size, "white")
        flat.alpha_composite(layered)
        return flat.convert("RGB")
    return image.convert("RGB")
