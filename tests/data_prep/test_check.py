"""The check of single files: what is kept as it came, what is converted, what is refused and why."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.check import CheckedSample, Refused, check_file
from data_prep.shard_plan import Settings
from pipeline.data.image import decode_image

SPEECH = Settings("speech", 1, (("train", 1.0),), "file", 0)
IMAGES = Settings("image", 1, (("train", 1.0),), "file", 0)


def check_one(content: bytes, settings: Settings) -> CheckedSample:
    (sample,) = check_file(content, settings)
    return sample


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
    sample = check_one(content, SPEECH)
    assert sample.content == content
    assert (sample.suffix, sample.length) == (form.lower(), 16_000)


@pytest.mark.parametrize(
    ("options", "length"),
    [({"rate": 22_050}, 16_000), ({"rate": 8_000}, 16_000), ({"channels": 2}, 16_000), ({"form": "OGG"}, 16_000)],
)
def test_other_sound_becomes_16_khz_mono_flac(options: dict[str, object], length: int) -> None:
    sample = check_one(sound(**options), SPEECH)
    info = soundfile.info(io.BytesIO(sample.content))
    assert (info.samplerate, info.channels, info.format, info.frames) == (16_000, 1, "FLAC", length)
    assert (sample.suffix, sample.length) == ("flac", length)
    assert sample.content == check_one(sound(**options), SPEECH).content


def test_bad_sound_is_refused_with_the_reason() -> None:
    nan = io.BytesIO()
    soundfile.write(nan, np.full(16_000, np.nan), 16_000, "FLOAT", format="WAV")
    loud = io.BytesIO()
    soundfile.write(loud, np.full(16_000, 1e30), 16_000, "FLOAT", format="WAV")
    whole_wav = sound(form="WAV")
    for content, reason in [
        (b"", "the file is empty"),
        (b"RIFF", "not decodable as audio"),
        (sound()[:-4000], "not decodable as audio|ends after"),
        (sound(0.05), "lasts 0.050 s, less than 0.1 s"),
        (nan.getvalue(), "not numbers"),
        (loud.getvalue(), r"a value of 1e\+30, where full scale is 1"),
    ]:
        with pytest.raises(Refused, match=reason):
            check_one(content, SPEECH)
    assert check_one(whole_wav, SPEECH).length == 16_000


@pytest.mark.parametrize(
    ("mode", "form", "suffix"), [("RGB", "JPEG", "jpg"), ("L", "JPEG", "jpg"), ("RGBA", "PNG", "png")]
)
def test_pictures_in_the_right_form_are_kept_byte_for_byte(mode: str, form: str, suffix: str) -> None:
    content = picture(mode, form)
    sample = check_one(content, IMAGES)
    assert sample.content == content
    assert (sample.suffix, sample.width, sample.height, sample.length) == (suffix, 90, 60, 5400)
    assert check_one(content, replace(IMAGES, image_size=60)).content == content


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (picture("CMYK"), "JPEG"),
        (picture(form="WEBP"), "JPEG"),
        (picture(form="BMP"), "JPEG"),
        (picture(form="TIFF"), "JPEG"),
        (picture("P", "GIF"), "JPEG"),
        (picture(form="JPEG2000"), "JPEG"),
        (picture("I;16", "TIFF"), "JPEG"),
        (picture("I;16", "PNG"), "PNG"),
    ],
)
def test_other_pictures_are_converted_to_rgb(content: bytes, form: str) -> None:
    sample = check_one(content, IMAGES)
    with Image.open(io.BytesIO(sample.content)) as image:
        assert (image.format, image.mode, image.size) == (form, "RGB", (90, 60))


def test_turned_photographs_are_stored_upright() -> None:
    sample = check_one(picture(orientation=6), IMAGES)
    assert (sample.width, sample.height) == (60, 90)
    with Image.open(io.BytesIO(sample.content)) as image:
        assert image.size == (60, 90)
        assert image.getexif().get(0x0112, 1) == 1


def test_large_pictures_are_scaled_by_their_shorter_side() -> None:
    sample = check_one(picture(size=(900, 600)), replace(IMAGES, image_size=100))
    assert (sample.width, sample.height, sample.length) == (150, 100, 15_000)
    assert sample.metadata["source_width"] == 900
    assert check_one(picture(size=(90, 60)), replace(IMAGES, image_size=100)).width == 90


def test_bad_pictures_are_refused_with_the_reason() -> None:
    for content, reason in [
        (b"", "the file is empty"),
        (b"text", "not decodable as an image"),
        (picture()[:-600], "truncated"),
        (picture(form="PNG")[:-600], "not decodable as an image"),
    ]:
        with pytest.raises(Refused, match=reason):
            check_one(content, IMAGES)


def words(text: str) -> np.ndarray:
    """Bursts of noise, in quarters of a second, where ``text`` has letters, and silence at its spaces."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (len(text), 4_000))
    return np.concatenate([burst * (letter != " ") for letter, burst in zip(text, noise, strict=True)])


def encoded(waveform: np.ndarray, rate: int = 16_000, form: str = "FLAC", subtype: str | None = None) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, waveform, rate, subtype, format=form)
    return target.getvalue()


@pytest.mark.parametrize("form", ["FLAC", "OGG"])
def test_long_recordings_are_cut_at_quiet_places(form: str) -> None:
    text = "abc def ghi jk lmn opq rst uv wxy zab cde fgh ijk lmn opq rs tuv wxy z"
    content = encoded(words(text), form=form)
    pieces = check_file(content, replace(SPEECH, max_seconds=4.0))
    assert [piece.piece for piece in pieces] == list(range(len(pieces)))
    assert len(pieces) >= 5
    assert all(1.5 * 16_000 <= piece.length <= 4 * 16_000 for piece in pieces)
    begins = [piece.metadata["begins_at"] for piece in pieces]
    assert begins == [sum(piece.length for piece in pieces[:place]) / 16_000 for place in range(len(pieces))]
    whole, _ = soundfile.read(io.BytesIO(content), dtype="int16")
    joined = np.concatenate([soundfile.read(io.BytesIO(piece.content), dtype="int16")[0] for piece in pieces])
    if form == "FLAC":  # nothing is lost, doubled or changed
        assert np.array_equal(joined, whole)
    assert len(joined) == len(whole)
    assert {text[int(begin * 4)] for begin in begins[1:]} == {" "}
    assert pieces[0].metadata["source_format"] == form
    short = check_one(encoded(words("abc")), replace(SPEECH, max_seconds=2.0))
    assert short.piece is None
    assert short.content == encoded(words("abc"))


def test_a_long_recording_of_another_rate_loses_nothing() -> None:
    """Ten pieces from a resampled stereo file are the whole file, resampled at once."""
    waveform = np.random.default_rng(1).uniform(-0.3, 0.3, (10 * 44_100, 2))
    content = encoded(waveform, 44_100, "WAV")
    pieces = check_file(content, replace(SPEECH, max_seconds=1.0))
    (whole,) = check_file(content, SPEECH)
    joined = np.concatenate([soundfile.read(io.BytesIO(piece.content), dtype="int16")[0] for piece in pieces])
    assert np.array_equal(joined, soundfile.read(io.BytesIO(whole.content), dtype="int16")[0])
    assert len(joined) == whole.length == 160_000


def test_sound_that_can_be_kept_to_the_bit_is() -> None:
    """Two equal channels average to what each of them holds, up to the loudest sample."""
    mono = np.array([-32768, 32767, -32767, 1, 0, -1] * 1000, dtype=np.int16)
    sample = check_one(encoded(np.stack([mono, mono], axis=1)), SPEECH)
    assert np.array_equal(soundfile.read(io.BytesIO(sample.content), dtype="int16")[0], mono)


@pytest.mark.parametrize(
    ("form", "subtype", "reason"),
    [
        ("WAV", None, "is cut short: .* bytes of sound are there"),
        ("OGG", "VORBIS", "is cut short: its last page is not whole"),
        ("OGG", "OPUS", "is cut short: its last page is not whole"),
        ("MP3", None, "its frames hold .* samples and its header tells of"),
        ("FLAC", None, "not decodable as audio|ends after"),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_sound_that_was_cut_off_is_refused(form: str, subtype: str | None, reason: str, share: float) -> None:
    content = encoded(words("abcdefghijklmnop" * 4), form=form, subtype=subtype)
    assert check_one(content, SPEECH).length == pytest.approx(16 * 16_000, abs=1200)
    with pytest.raises(Refused, match=reason):
        check_file(content[: int(share * len(content))], SPEECH)


def test_an_mp3_that_does_not_tell_its_length_is_refused_if_the_guess_is_wrong() -> None:
    """libsndfile would read less than a third of it, and say nothing."""
    content = encoded(np.concatenate([words("abcdefgh"), np.zeros(320_000)]), form="MP3")
    untold = content[content.index(b"\xff\xf3", 4) :]  # without the first frame, which tells it
    assert check_one(content, SPEECH).length > 340_000
    with pytest.raises(Refused, match="without a length"):
        check_file(untold, SPEECH)


def test_flac_of_unknown_length_is_refused() -> None:
    content = bytearray(sound())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])
    with pytest.raises(Refused, match="does not say how long it is"):
        check_file(bytes(content), SPEECH)


def test_a_flipped_bit_is_found_by_the_full_check_and_not_by_the_header_s() -> None:
    content = bytearray(sound())
    content[len(content) // 2] ^= 1
    with pytest.raises(Refused, match=r"not decodable as audio|ends after"):
        check_file(bytes(content), SPEECH)
    assert check_one(bytes(content), replace(SPEECH, check="header")).length == 16_000
    image = picture()[:-600]
    with pytest.raises(Refused, match="truncated"):
        check_file(image, IMAGES)
    assert check_one(image, replace(IMAGES, check="header")).width == 90


def test_a_16_bit_picture_keeps_its_greys() -> None:
    ramp = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    target = io.BytesIO()
    Image.fromarray(ramp).save(target, "PNG")
    sample = check_one(target.getvalue(), IMAGES)
    with Image.open(io.BytesIO(sample.content)) as image:
        assert np.array_equal(np.asarray(image)[..., 0], ramp >> 8)


@pytest.mark.parametrize(("colour", "mode"), [("rgb", "RGB"), ("grey", "L")])
def test_pictures_of_one_colour_mode(colour: str, mode: str) -> None:
    settings = replace(IMAGES, colour=colour)
    for given in ("RGB", "L"):
        content = picture(given)
        sample = check_one(content, settings)
        assert (sample.content == content) == (given == mode)
        with Image.open(io.BytesIO(sample.content)) as image:
            assert image.mode == mode


def test_pictures_of_one_format_and_quality() -> None:
    settings = replace(IMAGES, image_format="jpeg", jpeg_quality=60)
    sample = check_one(picture("RGBA", "PNG"), settings)
    assert sample.suffix == "jpg"
    better = check_one(picture("RGBA", "PNG"), replace(settings, jpeg_quality=95))
    assert len(sample.content) < len(better.content)
    jpeg = picture()
    assert check_one(jpeg, settings).content == jpeg


def test_what_is_no_photograph_is_refused() -> None:
    frames = [Image.effect_noise((40, 30), 80).convert("RGB") for _ in range(3)]
    for form in ("WEBP", "PNG", "GIF", "TIFF"):
        target = io.BytesIO()
        frames[0].save(target, form, save_all=True, append_images=frames[1:])
        with pytest.raises(Refused, match="holds 3 frames: an animation"):
            check_file(target.getvalue(), IMAGES)
    with pytest.raises(Refused, match="is 1 × 1 pixels, less than 8"):
        check_file(picture(size=(1, 1)), IMAGES)
    huge = bytearray(picture(form="PNG"))
    huge[16:24] = struct.pack(">II", 20_000, 20_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    with pytest.raises(Refused, match=r"too large: .*decompression bomb"):
        check_file(bytes(huge), IMAGES)


def test_pictures_without_a_known_white_are_refused() -> None:
    for dtype in (np.float32, np.int32):
        target = io.BytesIO()
        Image.fromarray(np.linspace(0, 1, 400).reshape(20, 20).astype(dtype)).save(target, "TIFF")
        with pytest.raises(Refused, match="holds values of 32 bits, which do not say what is white"):
            check_file(target.getvalue(), IMAGES)


def test_no_program_is_run_on_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand PostScript to Ghostscript, whatever the file's name."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"
    started: list[object] = []
    monkeypatch.setattr("subprocess.check_call", lambda *command, **_: started.append(command))
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    with pytest.raises(Refused, match="not decodable as an image: cannot identify"):
        check_file(postscript, IMAGES)
    assert not started


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "I;16"])
def test_every_kept_or_converted_mode_is_what_training_reads(mode: str) -> None:
    """Stored pictures decode to the colours that Pillow shows; transparency is white."""
    grey = Image.linear_gradient("L").resize((40, 30))
    given = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    target = io.BytesIO()
    given.save(target, "PNG")
    decoded = decode_image(check_one(target.getvalue(), IMAGES).content).numpy()
    assert decoded.shape == (3, 30, 40)
    expected = np.asarray(grey.convert("1").convert("L") if mode == "1" else grey)
    assert np.abs(decoded.astype(int) - expected).max() <= (6 if mode == "P" else 0)


def test_a_camera_s_picture_with_previews_is_kept() -> None:
    target = io.BytesIO()
    first, preview = (Image.effect_noise(size, 80).convert("RGB") for size in ((90, 60), (30, 20)))
    first.save(target, "MPO", save_all=True, append_images=[preview])
    sample = check_one(target.getvalue(), IMAGES)
    assert sample.content == target.getvalue()
    assert (sample.suffix, sample.width) == ("jpg", 90)
