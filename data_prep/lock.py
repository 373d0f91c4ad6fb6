"""One preparation at a time in a folder, and a workspace that dies with it.

In: the folder of records below a data set. Out: a workspace on the same file system, in which shards are written before
they are renamed into place. The kernel, or the server of a network file system, holds the lock and lets it go when its
holder dies: nothing a dead preparation leaves is in the way of the next, on whichever machine it ran.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from uuid import uuid4

from data_prep.failure import PreparationError

LOCK_NAME = "lock"
WORKSPACE_PREFIX = "writing-"
_REMOVED_PREFIX = "removed-"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system mounted without locks


@contextmanager
def sole_workspace(folder: Path, out: Path | str | None = None) -> Iterator[Path]:
    """Hold ``folder``'s lock and yield a new workspace below it, which is gone afterwards; messages call what is
    prepared ``out``, by default the folder's parent.

    Workspaces of earlier preparations are removed first. Their workers may still run, orphans on another machine, and
    from then on can neither begin a file nor rename one into the data set. The same stops the earlier of two
    preparations where the file system has no locks.

    Raises :class:`PreparationError` if another preparation holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise PreparationError(
                f"{out or folder.parent} is being prepared by {_holder(file)}: wait until it is done, or "
                "stop it, and repeat the command"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        try:
            _write_holder(file)
            for leftover in (*folder.glob(f"{WORKSPACE_PREFIX}*"), *folder.glob(f"{_REMOVED_PREFIX}*")):
                _remove(leftover)
            workspace = folder / f"{WORKSPACE_PREFIX}{uuid4().hex}"
            workspace.mkdir()
            try:
                yield workspace
            finally:
                _remove(workspace)
        finally:
            file.truncate(0)  # the file stays: a lock on a removed one would keep nobody out


def _remove(workspace: Path) -> None:
    """Remove a workspace, first by one rename, after which its path leads nowhere."""
    removed = workspace.with_name(f"{_REMOVED_PREFIX}{uuid4().hex}")
    with suppress(FileNotFoundError):  # another preparation was faster
        workspace.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)  # network file systems keep open files: the next time, then


def _write_holder(file: IO[str]) -> None:
    file.truncate(0)
    file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    file.flush()


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        holder = json.loads(file.read())
        return f"process {holder['process']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):  # it has the lock and has not yet said who it is
        return "another process"
