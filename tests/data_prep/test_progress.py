"""What a preparation shows while it works."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest

from data_prep.progress import PreparationProgress, Tally, VerificationProgress, console_progress, duration
from data_prep.shard import Refusal, ShardRecord
from data_prep.shard_plan import ShardTask
from data_prep.source import SourceFile

START = PreparationProgress("speech", 10, 40, 1_000_000, 4_000_000, 1, 4, 1, 10, 1_000_000, 0, 0.0)


def after(shards: int) -> PreparationProgress:
    """One shard is from before, each other takes 5 s."""
    done = {"files_done": 10 * shards, "bytes_done": 1_000_000 * shards, "shards_done": shards}
    return replace(START, **done, refused=2, elapsed_seconds=5.0 * (shards - 1))


def test_rate_and_time_left_are_of_this_run() -> None:
    assert START.seconds_left is None
    assert "time left unknown yet" in START.line()
    assert (after(2).files_per_second, after(2).bytes_per_second, after(2).seconds_left) == (2.0, 200_000.0, 10.0)
    assert after(2).line() == (
        "preparing speech: 20/40 files, 2/4 shards (1 from before), 2 refused, 2.0/4.0 MB, 2 files/s, 0.2 MB/s, "
        "10 s left"
    )
    assert after(4).line().endswith("done in 15 s")
    idle = replace(after(2), idle_seconds=90.0, idle_at="speaker/clip.mp3")
    assert idle.line().endswith("10 s left, no file done for 1 min 30 s, at speaker/clip.mp3")
    assert [duration(seconds) for seconds in (0.4, 200, 18_430)] == ["0 s", "3 min 20 s", "5 h 07 min"]


def test_a_log_gets_a_line_at_once_now_and_then_and_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress("preparing speech") as show:
        for progress in (START, after(2), after(3), replace(after(3), elapsed_seconds=14.0), after(4)):
            show(progress)
    assert capsys.readouterr().err.splitlines() == [START.line(), after(3).line(), after(4).line()]


def test_lines_of_a_long_preparation_grow_rare(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress("preparing speech") as show:
        for second in range(24 * 3600):
            show(replace(after(2), elapsed_seconds=float(second)))
    assert 250 < len(capsys.readouterr().err.splitlines()) < 500


def test_verification_tells_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress("verifying") as show:
        for shards in range(1, 5):
            show(VerificationProgress(shards, 4, 10.0 * shards))
    assert capsys.readouterr().err.splitlines() == [
        "verifying: 1/4 shards, 30 s left",
        "verifying: 2/4 shards, 20 s left",
        "verifying: 3/4 shards, 10 s left",
        "verifying: 4/4 shards",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    with console_progress("preparing speech") as show:
        for shards in range(1, 4):
            show(after(shards))
    shown = terminal.getvalue()
    assert "preparing speech" in shown
    assert "30/40 files, 3/4 shards (1 from before), 2 refused, 2 files/s, 0.2 MB/s, 5 s left" in shown


def test_a_tally_counts_shards_that_are_being_written_by_file() -> None:
    def task(number: int, sizes: list[int]) -> ShardTask:
        return ShardTask("train", number, [SourceFile(f"{number}", "", "", 0, size, 1, "") for size in sizes])

    tasks = [task(0, [5, 5]), task(1, [1, 2, 3]), task(2, [10])]
    refusal = Refusal(path="", reason="", bytes=5)
    record = ShardRecord(plan="", entry=None, index_bytes=0, refused=[refusal], lengths=[], labels={})
    tally = Tally("image", tasks, [(tasks[0], record)])

    def counts(progress: PreparationProgress) -> tuple[int, ...]:
        return progress.files_done, progress.bytes_done, progress.shards_done, progress.refused

    first = tally.progress([])
    assert counts(first) == (2, 10, 1, 1)
    assert (first.files, first.bytes, first.shards) == (6, 26, 3)
    assert counts(tally.progress([(tasks[1], 2), (tasks[2], 0)])) == (4, 13, 1, 1)
    tally.add(tasks[1], record)
    assert counts(tally.progress([(tasks[2], 1)])) == (6, 26, 2, 2)
    assert (first.reused, first.reused_files, first.reused_bytes) == (1, 2, 10)
