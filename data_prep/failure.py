"""How a preparation ends before it is done: in every case repeating the command goes on from what is finished."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # trying again helps nobody
RESERVE = 2048  # bytes of tar headers, padding and description a sample


class PreparationError(RuntimeError):
    """A preparation that can't go on; the message names the file or folder and what would do."""


class PreparationStopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended a preparation in order; the message says how far it came."""


def is_full(error: BaseException) -> bool:
    """Whether the disk takes no more."""
    return isinstance(error, OSError) and error.errno in FULL


def full_disk(out: Path, error: OSError, files: int, size: int) -> PreparationError:
    """The error for a disk that takes no more, when ``files`` files of ``size`` bytes are still to be stored."""
    free = shutil.disk_usage(out).free
    return PreparationError(
        f"{out} can't take more data ({os.strerror(error.errno or 0)}): about {megabytes(size + files * RESERVE)} are "
        f"still to be written there and {megabytes(free)} are free: make room and repeat the command, it goes on from "
        "the finished shards"
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
