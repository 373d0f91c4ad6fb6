"""Decoding speech: the same bits from every decoder, whole or in part, and a clear word for what is damaged."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.data.audio import DecodeError, decode_audio, normalise, normalise_


@pytest.fixture(scope="module")
def clips(speech_source: Path) -> list[bytes]:
    """Whole FLAC files of several speakers."""
    files = sorted(path for path in speech_source.rglob("*.flac") if path.stat().st_size > 4096)
    return [path.read_bytes() for path in random.Random(0).sample(files, 40) if is_whole(path)]


def is_whole(path: Path) -> bool:
    try:
        soundfile.read(path)
    except soundfile.LibsndfileError:
        return False
    return True


def encode(samples: np.ndarray, form: str, subtype: str = "PCM_16", rate: int = 16_000) -> bytes:
    target = io.BytesIO()
    soundfile.write(target, samples, rate, subtype, format=form)
    return target.getvalue()


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(0, 0.2, (samples, channels))
    return np.clip(drawn, -1, 1)


def reference(content: bytes) -> np.ndarray:
    """float32 ``(samples, channels)`` as soundfile gives it."""
    return soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)[0]


def test_every_decoder_gives_the_same_bits(clips: list[bytes]) -> None:
    for content in clips:
        assert np.array_equal(decode_audio(content), reference(content)[:, 0])


@pytest.mark.parametrize(
    ("form", "subtype"),
    [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "FLOAT")],
)
def test_formats_and_depths_give_soundfiles_bits(form: str, subtype: str) -> None:
    content = encode(noise(9_000), form, subtype)
    assert np.array_equal(decode_audio(content), reference(content)[:, 0])
    assert np.array_equal(decode_audio(content, 4_097, 801), reference(content)[4_097:4_898, 0])


def test_a_part_is_a_piece_of_the_whole(clips: list[bytes]) -> None:
    """Seeking lands on the very sample, wherever in a FLAC frame it is."""
    drawn = random.Random(1)
    for content in clips:
        whole = reference(content)[:, 0]
        for _ in range(5):
            start = drawn.randrange(len(whole))
            samples = drawn.randrange(1, len(whole) - start + 1)
            assert np.array_equal(decode_audio(content, start, samples), whole[start : start + samples])


def test_samples_are_written_where_they_belong(clips: list[bytes]) -> None:
    for content in (clips[0], encode(noise(5_000), "WAV")):
        rows = np.full((2, 5_000), 7, dtype=np.float32)
        filled = decode_audio(content, 100, 3_000, rows[1, :3_000])
        assert np.shares_memory(filled, rows)
        assert np.array_equal(rows[1, :3_000], reference(content)[100:3_100, 0])
        assert (rows[0] == 7).all()
        assert (rows[1, 3_000:] == 7).all()


@pytest.mark.parametrize("form", ["FLAC", "WAV"])
def test_channels_are_averaged(form: str) -> None:
    content = encode(noise(3_000, channels=2), form)
    expected = reference(content).mean(axis=1)
    assert np.array_equal(decode_audio(content), expected)
    rows = np.zeros(1_000, dtype=np.float32)
    assert np.array_equal(decode_audio(content, 500, 1_000, rows), expected[500:1_500])


def test_what_is_no_audio_or_ends_early_is_an_error(clips: list[bytes]) -> None:
    wave = encode(noise(800), "WAV")
    with pytest.raises(DecodeError, match="ends after 800 of 900"):
        decode_audio(wave, 0, 900)
    for content in (b"no sound", b"fLaC", b"fLaC" + b"\0" * 100, clips[0][:30]):
        with pytest.raises(DecodeError, match="not decodable as audio"):
            decode_audio(content)
    with pytest.raises(DecodeError):
        decode_audio(clips[0], 0, len(reference(clips[0])) + 1)


def test_damage_is_found_whatever_is_damaged(clips: list[bytes]) -> None:
    """One byte changed anywhere, or the end missing: an error, or the samples as they were, of which an index tells how
    many there are.
    """
    drawn = random.Random(2)
    refused = 0
    for turn in range(400):
        content = drawn.choice(clips)
        whole = reference(content)[:, 0]
        if turn % 4:
            place = drawn.randrange(len(content) if turn % 4 > 1 else 90)
            damaged = content[:place] + bytes([content[place] ^ drawn.randrange(1, 256)]) + content[place + 1 :]
        else:
            damaged = content[: drawn.randrange(len(content))]
        try:
            samples = decode_audio(damaged, 0, len(whole))
        except DecodeError:
            refused += 1
        else:
            assert np.array_equal(samples, whole)
    assert refused > 200


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_an_error(value: float) -> None:
    """It would make the whole step's gradient NaN; as a bad sample it is counted and replaced."""
    waveform = np.full(2_000, 0.1, dtype=np.float32)
    waveform[1_500] = value
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(DecodeError, match="holds values that are not numbers"):
        decode_audio(buffer.getvalue())
    assert len(decode_audio(buffer.getvalue(), 0, 1_000)) == 1_000


def test_a_header_that_asks_for_all_memory_is_an_error(clips: list[bytes]) -> None:
    """A FLAC header has 36 bits for the number of samples: here they say 48 GB."""
    damaged = clips[0][:21] + bytes([clips[0][21] | 0x0F]) + b"\xff" * 4 + clips[0][26:]
    with pytest.raises(DecodeError, match=r"says 6871|ends after"):
        decode_audio(damaged)


def test_normalising_is_zero_mean_and_unit_variance(clips: list[bytes]) -> None:
    for content in (*clips[:5], encode(0.3 + 0.1 * noise(1_500), "WAV"), encode(noise(1_024), "WAV")):
        waveform = decode_audio(content)
        before = waveform.copy()
        exact = waveform.astype(np.float64) - waveform.mean(dtype=np.float64)
        exact /= np.sqrt(np.square(exact).mean() + 1e-5)
        assert np.abs(normalise(waveform) - exact).max() < 5e-6
        assert np.array_equal(waveform, before)
        assert np.array_equal(normalise_(waveform), normalise(before))
        assert not np.array_equal(waveform, before)


def test_normalising_silence_is_silence() -> None:
    for samples in (100, 1_024, 5_000):
        assert not normalise(np.full(samples, 0.25, dtype=np.float32)).any()
