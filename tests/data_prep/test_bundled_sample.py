"""The bundled sample: small, sound, and attributed."""

from __future__ import annotations

from pathlib import Path

import soundfile
from PIL import Image

from tests.conftest import SAMPLE


def test_the_sample_is_small_and_every_source_is_attributed() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) < 13_000_000
    attribution = (SAMPLE / "ATTRIBUTION.md").read_text()
    for part in ("speech", "images"):
        for folder in (SAMPLE / part).iterdir():
            assert f"`{part}/{folder.name}`" in attribution


def test_speech_is_balanced_over_five_languages() -> None:
    seconds: dict[str, float] = {}
    for path in good_files("speech"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert 1.4 <= info.duration <= 12.1
        speaker = path.relative_to(SAMPLE / "speech").parts[0]
        seconds[speaker] = seconds.get(speaker, 0) + info.duration
    assert len(seconds) == 5
    assert min(seconds.values()) > 0.85 * max(seconds.values())


def test_images_are_tiles_of_128_pixels() -> None:
    files = good_files("images")
    assert len(files) == 280
    for path in files:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((128, 128), "RGB")


def good_files(part: str) -> list[Path]:
    return [path for path in sorted((SAMPLE / part).rglob("*.*")) if "broken" not in path.name]
