"""What a preparation shows while it works."""

from __future__ import annotations

import io
import sys

import pytest

from data_prep.progress import PreparationProgress, console_progress


def after(shards: int) -> PreparationProgress:
    return PreparationProgress("speech", 10 * shards, 40, 1_000_000 * shards, 4_000_000, shards, 4, 0, 2, 0.5 * shards)


def test_a_log_gets_a_line_at_the_end_and_not_one_a_shard(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress("speech") as show:
        for shards in range(1, 5):
            show(after(shards))
    expected = "preparing speech: 40/40 files, 4/4 shards, 4.0/4.0 MB, 20 files/s, 2 refused\n"
    assert capsys.readouterr().err == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with console_progress("speech") as show:
        for shards in range(1, 5):
            show(after(shards))
    shown = terminal.getvalue()
    assert "preparing speech" in shown
    assert "4.0/4.0 MB" in shown
    assert "40 files, 4 shards, 2 refused" in shown
