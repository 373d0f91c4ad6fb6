"""One preparation at a time, and nothing of a dead one in the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import PreparationError
from data_prep.lock import sole_workspace

HOLD = """
import sys, time
from pathlib import Path
from data_prep.lock import sole_workspace
with sole_workspace(Path(sys.argv[1])) as workspace:
    print(workspace, flush=True)
    time.sleep(600)
"""


def test_the_second_is_refused_by_name_and_the_first_undisturbed(tmp_path: Path) -> None:
    folder = tmp_path / "set" / ".prepare"
    with sole_workspace(folder) as workspace:
        (workspace / "half").write_bytes(b"written")
        with pytest.raises(PreparationError, match=rf"{tmp_path}/set is being prepared by process {os.getpid()} on "):
            sole_workspace(folder).__enter__()
        assert (workspace / "half").read_bytes() == b"written"
    assert [path.name for path in folder.iterdir()] == ["lock"]
    assert (folder / "lock").read_bytes() == b""
    with sole_workspace(folder) as another:
        assert another != workspace


def test_a_lock_dies_with_its_holder_and_its_workspace_with_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "set" / ".prepare"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        abandoned = Path(process.stdout.readline().strip())
        try:
            with pytest.raises(PreparationError, match=f"by process {process.pid} on "):
                sole_workspace(folder).__enter__()
        finally:
            process.send_signal(signal.SIGKILL)
    (abandoned / "room").mkdir()
    # An orphaned worker has it open, and writes on.
    with (abandoned / "room" / "tar").open("wb") as file, sole_workspace(folder) as workspace:
        assert not abandoned.exists()
        file.write(b"more")
        assert [path.name for path in folder.glob("*-*")] == [workspace.name]
    assert [path.name for path in folder.iterdir()] == ["lock"]
