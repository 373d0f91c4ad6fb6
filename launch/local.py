"""Trains on this machine: torchrun starts the ranks and stops them all when one dies.

In: a recipe, overrides, a run folder, a number of ranks. Out: the exit code of the run. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.training.checkpoint import checkpoint_name
from pipeline.training.stop import RESUME_ME, SIGNALS


def rank_environment(ranks: int) -> dict[str, str]:
    """Environment of the ranks of one node: the cores are shared out, unless OMP_NUM_THREADS says otherwise."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    # MKL and oneDNN read it too. Without it every rank takes all cores and they wait for one another.
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def local_command(recipe: str, overrides: Sequence[str], run: Path, ranks: int) -> list[str]:
    """The command that trains on ``ranks`` ranks of this machine."""
    return [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=0"),
        *("-m", "pipeline.training", recipe, *overrides, "--run-dir", str(run)),
    ]


def train_locally(
    recipe: str, overrides: Sequence[str], run: Path, ranks: int, steps: int, *, profile: bool = False
) -> int:
    """Train to ``steps`` and return the exit code; a rank that dies ends the others.

    A signal to stop goes on to the ranks, which save their state: the code is :data:`pipeline.training.stop.RESUME_ME`
    then.
    """
    # torchrun takes any code but 0 of a rank for a crash, and says so at length.
    command = [*local_command(recipe, overrides, run, ranks), "--interrupted-code=0", *["--profile"] * profile]
    process = subprocess.Popen(command, env=os.environ | rank_environment(ranks))
    with _forwarded(process.pid) as stopped:
        code = process.wait()
    if (code == 0 or stopped) and not (run / "checkpoints" / checkpoint_name(steps)).is_dir():
        return RESUME_ME
    return code


@contextmanager
def _forwarded(launcher: int) -> Iterator[list[int]]:
    """Within the block signals to stop go to the ranks and not to torchrun, which would give them 30 seconds; gives
    those that came."""
    import psutil

    stopped: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        stopped.append(number)
        with suppress(psutil.NoSuchProcess):
            for rank in psutil.Process(launcher).children():
                rank.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
