"""Spoken telephone prompts of the Asterisk packages: one speaker a language, 16 kHz, CC-BY and CC-BY-SA.

In: unpacked packages. Out: clips as float32 arrays. Needs the ffmpeg program for the G.722 codec.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.benchmarks.debian import require

SAMPLE_RATE = 16_000
SPEAKERS = {"en": "allison-en", "es": "allison-es", "fr": "june-fr", "it": "carlo-it", "ru": "ivrvoice-ru"}
PACKAGES = [f"asterisk-core-sounds-{language}-g722" for language in SPEAKERS]
G722_BYTES_PER_SECOND = 8_000
NOT_SPEECH = {"silence", "tt-monkeys", "beep", "beeperr", "ascending-2tone", "descending-2tone"}


@dataclass(frozen=True)
class Prompt:
    """A prompt before it is decoded."""

    language: str
    speaker: str
    chapter: str
    name: str
    path: Path

    @property
    def seconds(self) -> float:
        """Duration, which G.722's constant rate gives without decoding."""
        return self.path.stat().st_size / G722_BYTES_PER_SECOND

    @property
    def stem(self) -> str:
        """File name without suffix: speaker, chapter and prompt, as LibriSpeech names its files."""
        return f"{self.speaker}-{self.chapter}-{self.name}"

    def decode(self) -> np.ndarray:
        """float32 ``(samples,)`` at 16 kHz."""
        ffmpeg = require("ffmpeg", "decoding G.722")
        command = [ffmpeg, "-v", "error", "-f", "g722", "-i", str(self.path)]
        to_pcm = ["-f", "s16le", "-ar", str(SAMPLE_RATE), "-ac", "1", "-"]
        done = subprocess.run(command + to_pcm, capture_output=True, check=True)
        return np.frombuffer(done.stdout, dtype="<i2").astype(np.float32) / 32768


def list_prompts(folders: dict[str, Path]) -> Iterator[Prompt]:
    """The prompts of all languages, sorted; tones and silences are left out."""
    for language, speaker in SPEAKERS.items():
        folder = folders[f"asterisk-core-sounds-{language}-g722"] / "usr/share/asterisk/sounds"
        for path in sorted(folder.rglob("*.g722")):
            chapter = "-".join(path.parent.relative_to(folder).parts[1:]) or "prompts"
            if not NOT_SPEECH & {chapter, path.stem}:
                yield Prompt(language, speaker, chapter, path.stem, path)
