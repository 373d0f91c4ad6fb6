"""Fixtures of several test files of preparation."""

from __future__ import annotations

from pathlib import Path

import pytest

POISON = b"POISON"
# No file is known that makes these decoders crash, so a null pointer is read when one comes along that says so.
CRASHING_DECODER = """
import ctypes
import soundfile

open_sound = soundfile.SoundFile.__init__

def open_or_crash(self, file, *rest, **named):
    if file.getvalue().endswith(b"POISON"):
        ctypes.string_at(0)
    open_sound(self, file, *rest, **named)

soundfile.SoundFile.__init__ = open_or_crash
"""


@pytest.fixture
def crashing_decoder(tmp_path: Path) -> Path:
    """A folder that, in PYTHONPATH, makes every Python process one whose audio decoder has a hole."""
    folder = tmp_path / "hole"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CRASHING_DECODER)
    return folder
