"""Whether a file kills the process that decodes it: tried in a process of its own.

In: a file's content. Out: the name of the signal that its decoder dies by, or None. Decoders are C libraries, and among
millions of files some find a hole in one; such a file is to be set aside and not to end a preparation.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import suppress

from data_prep.check import Refused, check_file

# What a process does to itself. SIGKILL and SIGTERM come from outside, and are no fault of the file.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


def crash_of(kind: str, content: bytes, image_size: int | None) -> str | None:
    """``"SIGSEGV"`` and the like, or None if the file is decoded or refused in order."""
    command = [sys.executable, "-m", "data_prep.probe", kind, str(image_size or "")]
    done = subprocess.run(command, input=content, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    number = -done.returncode
    return signal.Signals(number).name if number in _CRASHES else None


def main() -> None:
    """Decode what comes in, as the check does."""
    kind, image_size = sys.argv[1:]
    with suppress(Refused):
        check_file(kind, sys.stdin.buffer.read(), int(image_size) if image_size else None)


if __name__ == "__main__":
    main()
