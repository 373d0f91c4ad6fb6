"""Being told to stop: SIGTERM from an operator or a scheduler, SIGUSR1 from Slurm ahead of a time limit, Ctrl-C.

In: signals. Out: a flag that the loop looks at between steps. A handler that did more would run in the middle of a
collective.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
RESUME_ME = 75
"""Exit code of a run that was stopped and can go on (EX_TEMPFAIL of sysexits.h: try again later)."""


class Interrupted(RuntimeError):
    """The run was told to stop, has saved its state, and goes on when it is started again."""


class StopRequest:
    """Context manager: while it is open, :data:`SIGNALS` set ``signal_name`` instead of ending the process. Outside of
    the main thread, where Python takes no signals, it does nothing."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
