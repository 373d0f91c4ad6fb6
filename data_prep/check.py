"""The check of one file: every byte is decoded before it may enter a shard.

In: a source file's content. Out: what is stored, or :class:`Refused` with the reason. Files that already are what
training reads are stored as they came, byte for byte; others are converted.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.audio import DecodeError, read_audio
from pipeline.data.config import SAMPLE_RATE

SHORTEST_SECONDS = 0.1  # four frames of the speech encoder: less can't be masked
JPEG_QUALITY = 95
KEPT_MODES = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1")}  # what any decoder reads alike


class Refused(ValueError):
    """A file that does not go into the data set; the message is the reason."""


@dataclass(frozen=True)
class CheckedSample:
    """What a shard stores of one file."""

    content: bytes
    suffix: str  # "flac", "wav", "jpg" or "png"
    length: int  # audio samples at 16 kHz, or width × height
    width: int
    height: int
    metadata: dict[str, Any]


def check_file(kind: str, content: bytes, image_size: int | None) -> CheckedSample:
    """Decode the whole file and convert it where needed; raises :class:`Refused`."""
    if not content:
        raise Refused("the file is empty")
    return check_speech(content) if kind == "speech" else check_image(content, image_size)


def check_speech(content: bytes) -> CheckedSample:
    """Speech as 16 kHz mono: FLAC and WAV of that form are kept, the rest is averaged, resampled and stored as FLAC."""
    try:
        waveform, rate, channels, form = read_audio(content)
    except DecodeError as error:
        raise Refused(str(error)) from error
    if not np.isfinite(waveform).all():
        raise Refused("holds values that are not numbers")
    metadata: dict[str, Any] = {}
    suffix = form.lower()
    if rate != SAMPLE_RATE or channels != 1 or form not in ("FLAC", "WAV"):
        metadata = {"source_rate": rate, "source_channels": channels, "source_format": form}
        waveform, content, suffix = *_to_flac(waveform, rate), "flac"
    seconds = len(waveform) / SAMPLE_RATE
    if seconds < SHORTEST_SECONDS:
        raise Refused(f"lasts {seconds:.3f} s, less than {SHORTEST_SECONDS} s")
    metadata |= {"samples": len(waveform), "sample_rate": SAMPLE_RATE}
    return CheckedSample(content, suffix, len(waveform), 0, 0, metadata)


def _to_flac(waveform: np.ndarray, rate: int) -> tuple[np.ndarray, bytes]:
    import soundfile
    import soxr

    if rate != SAMPLE_RATE:
        waveform = soxr.resample(waveform, rate, SAMPLE_RATE)
    target = io.BytesIO()
    soundfile.write(target, np.clip(waveform, -1, 1), SAMPLE_RATE, "PCM_16", format="FLAC")
    return waveform, target.getvalue()


def check_image(content: bytes, image_size: int | None) -> CheckedSample:
    """JPEG and PNG are kept; other formats, CMYK and turned photographs are converted, and scaled if they are to be
    smaller.
    """
    from PIL import Image, ImageOps

    from pipeline.data.rgb import to_rgb

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata
            opened = Image.open(io.BytesIO(content))
            opened.load()
    except Image.DecompressionBombError as error:
        raise Refused(f"too large: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for damaged files
        raise Refused(f"not decodable as an image: {str(error).split(' <_io')[0]}") from error
    form = opened.format or ""
    image: Image.Image = opened
    turned = image.getexif().get(0x0112, 1) != 1  # the camera was held upright
    scale = image_size / min(image.size) if image_size is not None and min(image.size) > image_size else None
    keep = image.mode in KEPT_MODES.get(form, ()) and not turned
    metadata: dict[str, Any] = {}
    if not keep or scale is not None:
        metadata = {"source_width": image.width, "source_height": image.height, "source_format": form}
        image = to_rgb(ImageOps.exif_transpose(image))
        if scale is not None:
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            image = image.resize(size, Image.Resampling.LANCZOS)
        target = io.BytesIO()
        if form == "PNG":
            image.save(target, "PNG")
        else:
            image.save(target, "JPEG", quality=JPEG_QUALITY)
        content = target.getvalue()
    suffix = "png" if form == "PNG" else "jpg"
    metadata |= {"width": image.width, "height": image.height}
    return CheckedSample(content, suffix, image.width * image.height, image.width, image.height, metadata)
