"""One training at a time in a run folder.

In: the run folder, on every rank. Out: a lock that rank 0 holds until the process ends, and a claim in the lock's file.
The kernel, or the server of a network file system, lets the lock go when its holder dies: nothing a dead run leaves is
in the way of its next start. Where a file system has no locks, or a server has given up a holder that it can't reach,
two could hold the folder: the later claim counts, and who finds another's claim than its own stops before it writes.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from pathlib import Path
from typing import IO
from uuid import uuid4

from pipeline import collectives

logger = logging.getLogger("tessera")

LOCK_FILE = ".lock"
PATIENCE = 60.0
"""Seconds that a start waits for the run before: ranks that lost their launcher save their state first."""
_BETWEEN = ", claim "
_ROUND = 3.0
_WAIT = 0.2
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system mounted without locks


class RunInUse(RuntimeError):
    """Another training holds the run folder; the message says which."""


class RunLock:
    """Holds ``run`` from its making to :meth:`close`. Every rank makes one, rank 0's takes the lock.

    ``claim`` names this start, on every rank. Raises :class:`RunInUse` on every rank when another training keeps the
    folder for ``patience`` seconds.
    """

    def __init__(self, run: Path, patience: float = PATIENCE) -> None:
        self._run = run
        self._file: IO[str] | None = None
        claim, holder, patient, told = "", "", True, False
        if collectives.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            self._file = (run / LOCK_FILE).open("a+")
        deadline = time.monotonic() + patience
        while not claim and patient:
            if collectives.rank() == 0:
                # In rounds, for the other ranks wait no longer than collective_timeout for an answer.
                claim, holder = self._take(min(deadline, time.monotonic() + _ROUND))
                patient = time.monotonic() < deadline
                if not claim and patient and not told:
                    seconds = deadline - time.monotonic()
                    logger.warning("%s is held by %s: waiting up to %.0f s for its end", run, holder, seconds)
                    told = True
            claim, holder, patient = collectives.all_gather_objects((claim, holder, patient))[0]
        if not claim:
            self.close()
            raise RunInUse(
                f"{run} is being trained by {holder or 'another process'}: wait until it is done, stop it, or give "
                "another --run"
            )
        self.claim = claim

    def check(self) -> None:
        """Raise :class:`RunInUse` when a later start has claimed the folder. Only rank 0 looks."""
        if self._file is None:
            return
        # Opened anew: what a network file system sends then is not older than this moment.
        holder, _, claim = (self._run / LOCK_FILE).read_text().strip().partition(_BETWEEN)
        if claim != self.claim:
            raise RunInUse(
                f"{self._run} was taken over by {holder or 'another start'} while this training could not be reached: "
                "this one ends here and changes nothing"
            )

    def close(self) -> None:
        """Let it go."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, deadline: float) -> tuple[str, str]:
        """The claim, or nothing and who holds the folder."""
        assert self._file is not None
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    self._file.seek(0)
                    return "", self._file.read().strip().partition(_BETWEEN)[0]
                time.sleep(_WAIT)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                break
        claim = uuid4().hex
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}{_BETWEEN}{claim}\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return claim, ""
