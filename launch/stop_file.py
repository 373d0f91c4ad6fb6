"""Signals for ranks that none reaches, in Ray's workers or on other hosts: they become a file in the run folder.

In: a run folder. Out: the file, which the ranks look for between steps (:mod:`pipeline.training.stop`).
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline.training.stop import SIGNALS, STOP_FILE


class StopFile:
    """Context manager: within it ``signals`` to stop are counted, and are the run's stop file once they are passed
    on."""

    def __init__(self, run: Path) -> None:
        self.signals = 0
        self._file = run / STOP_FILE
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopFile:
        self._file.unlink(missing_ok=True)  # of a launch before, whose ranks never came to read it
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._file.unlink(missing_ok=True)

    @property
    def wanted(self) -> bool:
        """Whether there was a signal."""
        return self.signals > 0

    def pass_on(self) -> None:
        """Write the file, once there was a signal."""
        if self.wanted:
            self._file.touch()

    def _note(self, _: int, __: FrameType | None) -> None:
        self.signals += 1
