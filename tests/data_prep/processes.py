"""Processes of a test, and everything that they start: found by their session, and all ended with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

RAY_WORKER = "ray::_write"  # what Ray calls a process that writes a shard
RAYLET = "raylet/raylet"
GCS = "gcs/gcs_server"


@dataclass(frozen=True)
class Session:
    """A process that leads a session, with its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self, name: str = "") -> list[int]:
        """Those of the session whose command line holds ``name``."""
        return [pid for pid in _session_members(self.process.pid) if name in _command(pid)]

    def kill(self, name: str = "") -> bool:
        """SIGKILL the first such process, by default the leader; False if there is none."""
        pids = self.processes(name) if name else [self.process.pid]
        with suppress(ProcessLookupError):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def end(self) -> None:
        """SIGKILL all of the session until none is left."""
        deadline = time.monotonic() + 30
        while pids := self.processes():
            assert time.monotonic() < deadline, [_command(pid) for pid in pids]
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()
            time.sleep(0.01)
        self.process.wait()


@contextmanager
def session(command: list[str], log: Path) -> Iterator[Session]:
    """Start ``command``; at the end nothing that it started is left."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    started = Session(process, log)
    try:
        yield started
    finally:
        started.end()


def descendants(ancestor: int, name: str) -> list[int]:
    """Processes below ``ancestor`` whose command line holds ``name``."""
    parents = {pid: parent for pid, parent, _ in _alive()}

    def below(pid: int) -> bool:
        return pid in parents and (parents[pid] == ancestor or below(parents[pid]))

    return [pid for pid in parents if below(pid) and name in _command(pid)]


def _session_members(leader: int) -> list[int]:
    return [pid for pid, _, session in _alive() if session == leader]


def _alive() -> Iterator[tuple[int, int, int]]:
    """Number, parent and session of each process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # pid (name) state parent group session …; the name may hold spaces
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    yield int(entry.name), int(fields[1]), int(fields[3])


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
