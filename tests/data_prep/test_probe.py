"""A file that kills its decoder, found in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.probe import crash_of
from tests.data_prep.conftest import POISON


def test_only_a_crash_is_one(speech_source: Path, crashing_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = next(path for path in sorted(speech_source.rglob("*.flac")) if "broken" not in path.name).read_bytes()
    broken = next(speech_source.rglob("broken-truncated.flac")).read_bytes()
    monkeypatch.setenv("PYTHONPATH", str(crashing_decoder))
    assert crash_of("speech", good + POISON, None) == "SIGSEGV"
    assert crash_of("speech", good, None) is None
    assert crash_of("speech", broken, None) is None
