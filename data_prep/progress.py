"""Progress of preparation and verification on the console.

In: :class:`PreparationProgress` or :class:`VerificationProgress` values. Out: a bar with rate and time left on a
terminal, elsewhere a plain line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from data_prep.shard import ShardRecord
from data_prep.shard_plan import ShardTask

FIRST_PAUSE = 10.0  # seconds between plain lines; later a twentieth of the time that has passed,
LONGEST_PAUSE = 300.0  # so that a log of days stays readable
IDLE_SECONDS = 60.0  # without any file done, that is worth a word


@dataclass(frozen=True)
class PreparationProgress:
    """How far a preparation is; files count whether they were stored or refused."""

    kind: str
    files_done: int
    files: int
    bytes_done: int  # of source files
    bytes: int
    shards_done: int
    shards: int
    reused: int  # shards that an earlier run had finished,
    reused_files: int  # and what they hold: done, but not by this run
    reused_bytes: int
    refused: int
    elapsed_seconds: float  # since this run began to write
    idle_seconds: float = 0.0  # since the last file was done,
    idle_at: str = ""  # and one of those that are waited for

    @property
    def files_per_second(self) -> float:
        """Of this run."""
        return (self.files_done - self.reused_files) / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Of this run, in bytes of source files."""
        return (self.bytes_done - self.reused_bytes) / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the rate of this run; None as long as there is none."""
        if self.shards_done == self.shards:
            return 0.0
        return (self.bytes - self.bytes_done) / self.bytes_per_second if self.bytes_per_second > 0 else None

    @property
    def share(self) -> float:
        """Of the work that is done, by bytes of source files."""
        return 1.0 if self.shards_done == self.shards else min(1.0, self.bytes_done / max(1, self.bytes))

    def counts(self) -> str:
        """Files, shards and refused files."""
        shards = f"{self.shards_done}/{self.shards} shards"
        if self.reused:
            shards += f" ({self.reused} from before)"
        return f"{self.files_done}/{self.files} files, {shards}, {self.refused} refused"

    def pace(self) -> str:
        """Rates and time left."""
        if self.shards_done == self.shards:
            left = f"done in {duration(self.elapsed_seconds)}"
        elif self.seconds_left is None:
            left = "time left unknown yet"
        else:
            left = f"{duration(self.seconds_left)} left"
        if self.idle_seconds >= IDLE_SECONDS and self.shards_done < self.shards:
            at = f", at {self.idle_at}" if self.idle_at else ""
            left += f", no file done for {duration(self.idle_seconds)}{at}"
        return f"{self.files_per_second:.0f} files/s, {self.bytes_per_second / 1e6:.1f} MB/s, {left}"

    def line(self) -> str:
        """One line of text."""
        size = f"{self.bytes_done / 1e6:.1f}/{self.bytes / 1e6:.1f} MB"
        return f"preparing {self.kind}: {self.counts()}, {size}, {self.pace()}"

    def brief(self) -> str:
        """What stands beside a bar."""
        return f"{self.counts()}, {self.pace()}"


@dataclass(frozen=True)
class VerificationProgress:
    """How far a verification is."""

    shards_done: int
    shards: int
    elapsed_seconds: float

    @property
    def share(self) -> float:
        """Of the work that is done."""
        return self.shards_done / self.shards if self.shards else 1.0

    def line(self) -> str:
        """One line of text."""
        return f"verifying: {self.brief()}"

    def brief(self) -> str:
        """What stands beside a bar."""
        left = f", {duration(self.elapsed_seconds * (1 / self.share - 1))} left" if 0 < self.share < 1 else ""
        return f"{self.shards_done}/{self.shards} shards{left}"


class Tally:
    """Counts what is done, without going through all files again each time.

    ``reused`` are the shards that were there before.
    """

    def __init__(self, kind: str, tasks: list[ShardTask], reused: list[tuple[ShardTask, ShardRecord]]) -> None:
        self._kind = kind
        self._files, self._bytes = sum(len(task.files) for task in tasks), sum(task.bytes for task in tasks)
        self._shards = len(tasks)
        self._done_files = self._done_bytes = self._done_shards = self._refused = 0
        for task, record in reused:
            self.add(task, record)
        self._reused, self._reused_files, self._reused_bytes = self._done_shards, self._done_files, self._done_bytes
        self._began = self._moved = time.monotonic()
        self._last: tuple[int, int] = (0, 0)

    def add(self, task: ShardTask, record: ShardRecord) -> None:
        """A shard is done."""
        self._done_files += len(task.files)
        self._done_bytes += task.bytes
        self._done_shards += 1
        self._refused += len(record.refused)

    def progress(self, under_way: list[tuple[ShardTask, int]]) -> PreparationProgress:
        """The state now, with shards that are being written and how many of their files are done."""
        now = time.monotonic()
        files = self._done_files + sum(place for _, place in under_way)
        if (files, self._done_shards) != self._last:
            self._last, self._moved = (files, self._done_shards), now
        partly = sum(file.size for task, place in under_way for file in task.files[:place])
        return PreparationProgress(
            kind=self._kind,
            files_done=files,
            files=self._files,
            bytes_done=self._done_bytes + partly,
            bytes=self._bytes,
            shards_done=self._done_shards,
            shards=self._shards,
            reused=self._reused,
            reused_files=self._reused_files,
            reused_bytes=self._reused_bytes,
            refused=self._refused,
            elapsed_seconds=now - self._began,
            idle_seconds=now - self._moved,
            idle_at=next((task.files[place].name for task, place in under_way if 0 < place < len(task.files)), ""),
        )


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3 min 20 s"`` or ``"5 h 07 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


Progress = PreparationProgress | VerificationProgress


@contextmanager
def console_progress(title: str) -> Iterator[Callable[[Progress], None]]:
    """A callable that shows progress as suits where standard error goes; ``title`` stands before a bar."""
    if not sys.stderr.isatty():
        next_at = 0.0  # seconds of the work's own time; the first line is a sign of life

        def show_line(progress: Progress) -> None:
            nonlocal next_at
            if progress.share == 1 or progress.elapsed_seconds >= next_at:
                pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, progress.elapsed_seconds / 20))
                next_at = progress.elapsed_seconds + pause
                print(progress.line(), file=sys.stderr, flush=True)

        yield show_line
        return

    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(title), BarColumn(bar_width=20), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0)

        def show_bar(progress: Progress) -> None:
            bar.update(task, completed=progress.share, description=progress.brief())

        yield show_bar
