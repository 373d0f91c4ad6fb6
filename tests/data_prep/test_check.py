"""The check of single files: what is kept as it came, what is converted, what is refused and why."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.check import Refused, check_file


def sound(seconds: float = 1.0, rate: int = 16_000, form: str = "FLAC", channels: int = 1) -> bytes:
    target = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), channels))
    soundfile.write(target, noise, rate, format=form)
    return target.getvalue()


def picture(
    mode: str = "RGB", form: str = "JPEG", size: tuple[int, int] = (90, 60), orientation: int | None = None
) -> bytes:
    target = io.BytesIO()
    image = Image.effect_noise(size, 80).convert("RGB").convert(mode)
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(target, form, exif=exif)
    return target.getvalue()


@pytest.mark.parametrize("form", ["FLAC", "WAV"])
def test_sound_in_the_right_form_is_kept_byte_for_byte(form: str) -> None:
    content = sound(form=form)
    sample = check_file("speech", content, None)
    assert sample.content == content
    assert (sample.suffix, sample.length) == (form.lower(), 16_000)


@pytest.mark.parametrize(
    ("options", "length"),
    [({"rate": 22_050}, 16_000), ({"rate": 8_000}, 16_000), ({"channels": 2}, 16_000), ({"form": "OGG"}, 16_000)],
)
def test_other_sound_becomes_16_khz_mono_flac(options: dict[str, object], length: int) -> None:
    sample = check_file("speech", sound(**options), None)
    info = soundfile.info(io.BytesIO(sample.content))
    assert (info.samplerate, info.channels, info.format, info.frames) == (16_000, 1, "FLAC", length)
    assert (sample.suffix, sample.length) == ("flac", length)
    assert sample.content == check_file("speech", sound(**options), None).content


def test_bad_sound_is_refused_with_the_reason() -> None:
    nan = io.BytesIO()
    soundfile.write(nan, np.full(16_000, np.nan), 16_000, "FLOAT", format="WAV")
    whole_wav = sound(form="WAV")
    for content, reason in [
        (b"", "the file is empty"),
        (b"RIFF", "not decodable as audio"),
        (sound()[:-4000], "not decodable as audio|ends after"),
        (sound(0.05), "lasts 0.050 s, less than 0.1 s"),
        (nan.getvalue(), "not numbers"),
    ]:
        with pytest.raises(Refused, match=reason):
            check_file("speech", content, None)
    assert check_file("speech", whole_wav, None).length == 16_000


@pytest.mark.parametrize(
    ("mode", "form", "suffix"), [("RGB", "JPEG", "jpg"), ("L", "JPEG", "jpg"), ("RGBA", "PNG", "png")]
)
def test_pictures_in_the_right_form_are_kept_byte_for_byte(mode: str, form: str, suffix: str) -> None:
    content = picture(mode, form)
    sample = check_file("image", content, None)
    assert sample.content == content
    assert (sample.suffix, sample.width, sample.height, sample.length) == (suffix, 90, 60, 5400)
    assert check_file("image", content, 60).content == content


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (picture("CMYK"), "JPEG"),
        (picture(form="WEBP"), "JPEG"),
        (picture(form="BMP"), "JPEG"),
        (picture("I;16", "PNG"), "PNG"),
    ],
)
def test_other_pictures_are_converted_to_rgb(content: bytes, form: str) -> None:
    sample = check_file("image", content, None)
    with Image.open(io.BytesIO(sample.content)) as image:
        assert (image.format, image.mode, image.size) == (form, "RGB", (90, 60))


def test_turned_photographs_are_stored_upright() -> None:
    sample = check_file("image", picture(orientation=6), None)
    assert (sample.width, sample.height) == (60, 90)
    with Image.open(io.BytesIO(sample.content)) as image:
        assert image.size == (60, 90)
        assert image.getexif().get(0x0112, 1) == 1


def test_large_pictures_are_scaled_by_their_shorter_side() -> None:
    sample = check_file("image", picture(size=(900, 600)), 100)
    assert (sample.width, sample.height, sample.length) == (150, 100, 15_000)
    assert sample.metadata["source_width"] == 900
    assert check_file("image", picture(size=(90, 60)), 100).width == 90


def test_bad_pictures_are_refused_with_the_reason() -> None:
    for content, reason in [
        (b"", "the file is empty"),
        (b"text", "not decodable as an image"),
        (picture()[:-600], "truncated"),
        (picture(form="PNG")[:-600], "not decodable as an image"),
    ]:
        with pytest.raises(Refused, match=reason):
            check_file("image", content, None)
