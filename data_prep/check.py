"""The check of one file: what is wrong with it is found before it may enter a shard.

In: a source file's content. Out: what is stored, or :class:`Refused` with the reason. Files that already are what
training reads are stored as they came, byte for byte; others are converted, and long recordings cut if they are to be.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.containers import what_is_cut
from data_prep.shard_plan import Settings
from pipeline.data.config import SAMPLE_RATE

if TYPE_CHECKING:
    import soundfile
    from PIL import Image

SHORTEST_SECONDS = 0.1  # four frames of the speech encoder: less can't be masked
LOUDEST = 2.0**31  # as loud as integers that were taken for fractions of full scale can be
SMALLEST_SIDE = 8  # pixels, as the smallest image that a model sees
KEPT_MODES = {"JPEG": ("RGB", "L"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1")}  # what any decoder reads alike
# What Image.open may try: for some others, PostScript among them, it runs programs on the file.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000")
_BLOCK = 1 << 18  # audio samples that are decoded at a time, so that ten hours need no more memory than a minute
_FRAME = 320  # audio samples, 20 ms: how finely a quiet place is looked for


class Refused(ValueError):
    """A file that does not go into the data set; the message is the reason."""


@dataclass(frozen=True)
class CheckedSample:
    """What a shard stores of one file, or of one piece of it."""

    content: bytes
    suffix: str  # "flac", "wav", "jpg" or "png"
    length: int  # audio samples at 16 kHz, or width × height
    width: int
    height: int
    metadata: dict[str, Any]
    piece: int | None = None  # which one of a recording that was cut


def check_file(content: bytes, settings: Settings) -> list[CheckedSample]:
    """Check a file and convert it where needed: one sample, or the pieces of a recording longer than
    ``settings.max_seconds`` in their order. Raises :class:`Refused`.
    """
    if not content:
        raise Refused("the file is empty")
    return check_speech(content, settings) if settings.kind == "speech" else [check_image(content, settings)]


def check_speech(content: bytes, settings: Settings) -> list[CheckedSample]:
    """Speech as 16 kHz mono: FLAC and WAV of that form are kept, the rest is averaged, resampled and stored as 16 bit
    FLAC.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            form, rate, frames = file.format, file.samplerate, file.frames
            if frames >= 1 << 48:
                raise Refused("its header does not say how long it is: encode it anew")
            reason = what_is_cut(form, content, frames)
            if reason is not None:
                raise Refused(reason)
            length = math.ceil(frames * SAMPLE_RATE / rate)
            if length < SHORTEST_SECONDS * SAMPLE_RATE:
                raise Refused(f"lasts {length / SAMPLE_RATE:.3f} s, less than {SHORTEST_SECONDS} s")
            cut = settings.max_seconds is not None and length > settings.max_seconds * SAMPLE_RATE
            if rate == SAMPLE_RATE and file.channels == 1 and form in ("FLAC", "WAV") and not cut:
                if settings.check == "full":
                    _decode_through(file)
                metadata = {"samples": frames, "sample_rate": SAMPLE_RATE}
                return [CheckedSample(content, form.lower(), frames, 0, 0, metadata)]
            source = {"source_rate": rate, "source_channels": file.channels, "source_format": form}
            waveforms = _as_16_khz(file)
            if not cut:
                return [_as_flac(np.concatenate(list(waveforms)), source)]
            longest = int((settings.max_seconds or 0) * SAMPLE_RATE)
            return list(_cut(waveforms, length, longest, source))
    except soundfile.LibsndfileError as error:
        # Its own text, for str(error) has the address of the buffer in it, and reasons must be repeatable.
        raise Refused(f"not decodable as audio: {error.error_string}") from error


def _decode_through(file: soundfile.SoundFile) -> None:
    """Decode every sample of a mono file, for the errors that come of it."""
    whole = "FLOAT" not in file.subtype and "DOUBLE" not in file.subtype  # integers need no look at their values
    buffer = np.empty(_BLOCK, np.int16 if whole else np.float32)
    decoded = 0
    while len(block := file.read(out=buffer)):
        decoded += len(block)
        if not whole:
            _refuse_values(block)
    _expect(file, decoded)


def _refuse_values(block: np.ndarray) -> None:
    """What a file of floating-point numbers may hold and no sound has."""
    peak = np.abs(block).max(initial=0.0)
    if not np.isfinite(peak):
        raise Refused("holds values that are not numbers")
    if peak > LOUDEST:
        raise Refused(f"holds a value of {peak:.3g}, where full scale is 1: encode it anew")


def _expect(file: soundfile.SoundFile, decoded: int) -> None:
    # An MP3's length is that of its frames, the encoder's delay and padding with it, or a guess near it.
    if decoded < file.frames * (0.97 if file.format == "MP3" else 1):
        raise Refused(f"ends after {decoded} of {file.frames} audio samples")


def _as_16_khz(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """The file's sound in blocks: int16 ``(samples,)`` at 16 kHz, channels averaged."""
    import soxr

    resampler = None
    if file.samplerate != SAMPLE_RATE:
        resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
    decoded, last = 0, False
    while not last:
        block = file.read(_BLOCK, dtype="float32", always_2d=True)  # (samples, channels)
        decoded += len(block)
        last = len(block) == 0
        _refuse_values(block)
        waveform = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1)
        if resampler is not None:
            waveform = resampler.resample_chunk(np.ascontiguousarray(waveform), last=last)
        # libsndfile divides by 32768 and multiplies by 32767: this gives back the integers that were decoded.
        yield np.clip(np.rint(waveform * 32768), -32768, 32767).astype(np.int16)
    _expect(file, decoded)


def _as_flac(waveform: np.ndarray, metadata: dict[str, Any], piece: int | None = None) -> CheckedSample:
    import soundfile

    target = io.BytesIO()
    soundfile.write(target, waveform, SAMPLE_RATE, "PCM_16", format="FLAC")
    metadata = metadata | {"samples": len(waveform), "sample_rate": SAMPLE_RATE}
    return CheckedSample(target.getvalue(), "flac", len(waveform), 0, 0, metadata, piece)


def _cut(
    waveforms: Iterator[np.ndarray], length: int, longest: int, metadata: dict[str, Any]
) -> Iterator[CheckedSample]:
    """A recording of about ``length`` samples in pieces of at most ``longest`` and at least 3/8 of it, which know
    where they begin.
    """
    held: np.ndarray = np.zeros(0, np.int16)
    begin, piece = 0, 0
    for waveform in waveforms:
        held = np.concatenate([held, waveform])
        while len(held) >= longest and length - begin > longest:
            size = _quiet_place(held, length - begin, longest)
            yield _as_flac(held[:size], metadata | {"begins_at": begin / SAMPLE_RATE}, piece)
            held, begin, piece = held[size:], begin + size, piece + 1
    yield _as_flac(held, metadata | {"begins_at": begin / SAMPLE_RATE}, piece)


def _quiet_place(waveform: np.ndarray, remaining: int, longest: int) -> int:
    """Where to cut a recording of which ``remaining`` samples are left: the quietest tenth of a second near the end of
    the first of equal parts.
    """
    wanted = remaining / math.ceil(remaining / longest)
    first, last = int(0.75 * wanted) // _FRAME, int(min(longest, 1.25 * wanted)) // _FRAME
    frames = waveform[first * _FRAME : last * _FRAME].reshape(-1, _FRAME).astype(np.int64)
    loudness = np.convolve(np.square(frames).sum(axis=1), np.ones(5, np.int64), "same")
    distance = np.abs((np.arange(first, last) + 0.5) * _FRAME - wanted)
    quietest = int(np.lexsort((distance, loudness))[0])
    return (first + quietest) * _FRAME + _FRAME // 2


def check_image(content: bytes, settings: Settings) -> CheckedSample:
    """JPEG and PNG are kept; other formats, CMYK, 16 bit and turned photographs are converted, and whatever the
    settings ask to be smaller, of another colour or of another format.
    """
    from PIL import Image, ImageOps

    from pipeline.data.rgb import to_rgb

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, and on sizes that it still takes
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            form = "JPEG" if image.format == "MPO" else image.format or ""  # cameras append previews to a JPEG
            if min(image.size) < SMALLEST_SIDE:
                raise Refused(f"is {image.width} × {image.height} pixels, less than {SMALLEST_SIDE}")
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise Refused(f"holds {getattr(image, 'n_frames', 0)} frames: an animation, or pages")
            if image.mode in ("F", "I"):
                raise Refused("holds values of 32 bits, which do not say what is white: store 8 or 16 bits a channel")
            turned = image.getexif().get(0x0112, 1) not in (0, 1)  # the camera was held upright
            size = _size(image.size, settings.image_size)
            mode = {"keep": None, "rgb": "RGB", "grey": "L"}[settings.colour]
            wanted = form if settings.image_format == "keep" else "JPEG"
            keep = image.mode in KEPT_MODES.get(form, ()) and mode in (None, image.mode) and form == wanted
            keep = keep and not turned and size == image.size
            if not keep or settings.check == "full":
                image.load()
            if keep:
                return _stored(content, form, image, {})
            metadata = {"source_width": image.width, "source_height": image.height, "source_format": form}
            turned_image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise Refused(f"too large: {error}") from error
    except Refused:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, KeyError, TypeError) as error:  # Pillow's for damaged files
        raise Refused(f"not decodable as an image: {str(error).split(' <_io')[0]}") from error
    image = to_rgb(turned_image)
    size = _size(image.size, settings.image_size)
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    if mode == "L" or (mode is None and turned_image.mode == "L"):
        image = image.convert("L")
    target = io.BytesIO()
    if wanted == "PNG":
        image.save(target, "PNG")
    else:
        image.save(target, "JPEG", quality=settings.jpeg_quality)
    return _stored(target.getvalue(), wanted, image, metadata)


def _size(size: tuple[int, int], shorter: int | None) -> tuple[int, int]:
    """Width and height with the shorter side ``shorter``, if that is less."""
    if shorter is None or min(size) <= shorter:
        return size
    scale = shorter / min(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _stored(content: bytes, form: str, image: Image.Image, metadata: dict[str, Any]) -> CheckedSample:
    suffix = "png" if form == "PNG" else "jpg"
    metadata = metadata | {"width": image.width, "height": image.height}
    return CheckedSample(content, suffix, image.width * image.height, image.width, image.height, metadata)
