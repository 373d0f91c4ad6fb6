"""Any picture as RGB. Apart from the decoders, so that preparation's workers need not load torch for it."""

from __future__ import annotations

from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with white behind transparent pixels."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image.convert("RGBA")
        flat = Image.new("RGBA", layered.size, "white")
        flat.alpha_composite(layered)
        return flat.convert("RGB")
    return image.convert("RGB")
