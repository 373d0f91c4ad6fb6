"""Whether a file kills the process that decodes it: tried in a process of its own.

In: a file's content. Out: the name of the signal that its decoder dies by, or None. Decoders are C libraries, and among
millions of files some find a hole in one; such a file is to be set aside and not to end a preparation.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

from data_prep.check import Refused, check_file
from data_prep.shard_plan import Settings

# What a process does to itself. SIGKILL and SIGTERM come from outside, and are no fault of the file.
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


def crash_of(content: bytes, settings: Settings) -> str | None:
    """``"SIGSEGV"`` and the like, or None if the file is decoded or refused in order."""
    command = [sys.executable, "-m", "data_prep.probe", json.dumps(asdict(settings))]
    done = subprocess.run(command, input=content, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    number = -done.returncode
    return signal.Signals(number).name if number in _CRASHES else None


def main() -> None:
    """Decode what comes in, as the check does."""
    settings = Settings(**json.loads(sys.argv[1]))
    with suppress(Refused):
        check_file(sys.stdin.buffer.read(), settings)


if __name__ == "__main__":
    main()
