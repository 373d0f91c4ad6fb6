"""One training at a time in a run folder.

In: the run folder, on every rank. Out: a lock that rank 0 holds until the process ends. The kernel, or the server of a
network file system, lets it go when its holder dies: nothing a dead run leaves is in the way of its next start.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from pipeline import collectives

LOCK_FILE = ".lock"
PATIENCE = 60.0
"""Seconds that a start waits for the run before: ranks that lost their launcher save their state first."""
_WAIT = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system mounted without locks


class RunInUse(RuntimeError):
    """Another training holds the run folder; the message says which."""


class RunLock:
    """Holds ``run`` from its making to :meth:`close`. Every rank makes one, rank 0's takes the lock.

    Raises :class:`RunInUse` on every rank when another training keeps it for ``patience`` seconds.
    """

    def __init__(self, run: Path, patience: float = PATIENCE) -> None:
        self._file: IO[str] | None = None
        problem = ""
        if collectives.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            self._file = (run / LOCK_FILE).open("a+")
            problem = self._take(run, patience)
        problem = collectives.all_gather_objects(problem)[0]
        if problem:
            self.close()
            raise RunInUse(problem)

    def close(self) -> None:
        """Let it go."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, run: Path, patience: float) -> str:
        """What is in the way, or nothing."""
        assert self._file is not None
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.seek(0)
                    return (
                        f"{run} is being trained by {self._file.read().strip() or 'another process'}: wait until it is "
                        "done, stop it, or give another --run"
                    )
                time.sleep(_WAIT)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                return ""
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return ""
