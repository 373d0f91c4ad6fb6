"""A file that kills its decoder, found in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.probe import crash_of
from data_prep.shard_plan import Settings
from tests.data_prep.conftest import POISON


def test_only_a_crash_is_one(speech_source: Path, crashing_decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = next(path for path in sorted(speech_source.rglob("*.flac")) if "broken" not in path.name).read_bytes()
    broken = next(speech_source.rglob("broken-truncated.flac")).read_bytes()
    monkeypatch.setenv("PYTHONPATH", str(crashing_decoder))
    settings = Settings("speech", 1, (("train", 1.0),), "file", 0, max_seconds=30.0)
    assert crash_of(good + POISON, settings) == "SIGSEGV"
    assert crash_of(good, settings) is None
    assert crash_of(broken, settings) is None
