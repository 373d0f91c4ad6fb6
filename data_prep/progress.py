"""Progress of a preparation on the console.

In: :class:`PreparationProgress` values. Out: a bar with rate and time left on a terminal, elsewhere a plain line now
and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LINE_EVERY = 10.0  # seconds between plain lines


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
    reused: int  # shards that an earlier run had finished
    refused: int
    elapsed_seconds: float

    @property
    def files_per_second(self) -> float:
        return self.files_done / self.elapsed_seconds if self.elapsed_seconds > 0 else 0.0

    def line(self) -> str:
        """One line of text."""
        return (
            f"preparing {self.kind}: {self.files_done}/{self.files} files, {self.shards_done}/{self.shards} shards, "
            f"{self.bytes_done / 1e6:.1f}/{self.bytes / 1e6:.1f} MB, {self.files_per_second:.0f} files/s, "
            f"{self.refused} refused"
        )


@contextmanager
def console_progress(kind: str) -> Iterator[Callable[[PreparationProgress], None]]:
    """A callable that shows progress as suits where standard error goes."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def show_line(progress: PreparationProgress) -> None:
            nonlocal shown
            if progress.shards_done == progress.shards or time.monotonic() - shown >= LINE_EVERY:
                shown = time.monotonic()
                print(progress.line(), file=sys.stderr, flush=True)

        yield show_line
        return

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(f"preparing {kind}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[files]} files, {task.fields[shards]} shards, {task.fields[refused]} refused"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, files=0, shards=0, refused=0)

        def show_bar(progress: PreparationProgress) -> None:
            bar.update(
                task,
                completed=progress.bytes_done,
                total=progress.bytes,
                files=progress.files_done,
                shards=progress.shards_done,
                refused=progress.refused,
            )

        yield show_bar
