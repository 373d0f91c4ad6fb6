"""Being told to stop: SIGTERM from an operator or a scheduler, SIGUSR1 from Slurm ahead of a time limit, Ctrl-C, a file
named ``stop`` in the run folder, or the death of the torchrun that started the ranks.

In: signals and a file. Out: the reason, which the loop looks at between steps. A handler that did more would run in the
middle of a collective.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RESUME_ME = 75
"""Exit code of a run that was stopped and can go on (EX_TEMPFAIL of sysexits.h: try again later)."""
STOP_FILE = "stop"
"""In the run folder; stops ranks that no signal reaches, such as those in Ray's workers. The stopped run removes it."""
_PARENT = os.getppid()
_LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # which alone always outlives its ranks
_loop_entered = threading.Event()


class Interrupted(RuntimeError):
    """The run was told to stop, has saved its state, and goes on when it is started again."""


class StopRequest:
    """Context manager: while it is open, :data:`SIGNALS` are a ``reason`` to stop instead of ending the process. Python
    takes no signals outside of the main thread: there the file alone counts."""

    def __init__(self, run: Path | None = None) -> None:
        """``run``: the folder whose :data:`STOP_FILE` counts; one rank that looks is enough."""
        self._file = run / STOP_FILE if run is not None else None
        self._signal_name = ""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str:
        """Why this rank should stop, or nothing."""
        if self._signal_name:
            return self._signal_name
        if self._file is not None and self._file.exists():
            return f"the file {self._file}"
        # Ranks that go on alone would be in the way of the run's next start.
        if _LAUNCHED_BY_TORCHRUN and os.getppid() != _PARENT:
            return "the end of torchrun"
        return ""

    def __enter__(self) -> StopRequest:
        _loop_entered.set()
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._file is not None and kind is not None and issubclass(kind, Interrupted):
            self._file.unlink(missing_ok=True)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal_name = signal.Signals(number).name


def leave_when_told(code: int) -> None:
    """Let :data:`SIGNALS`, and the end of torchrun, end the process with ``code`` from here on: before the first step
    there is nothing to save. :class:`StopRequest` takes over when it opens."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    if _LAUNCHED_BY_TORCHRUN:
        # A thread, since the main one may wait in C++ for a store that went with torchrun.
        threading.Thread(target=_leave_with_torchrun, args=(code,), name="tessera-orphan", daemon=True).start()


def _leave_with_torchrun(code: int) -> None:
    while not _loop_entered.wait(1.0):
        if os.getppid() != _PARENT:
            os._exit(code)
