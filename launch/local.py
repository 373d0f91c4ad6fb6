"""Trains on this machine: torchrun starts the ranks and stops them all when one dies.

In: a recipe, overrides, a run folder, a number of ranks. Out: the exit code of the run. Imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


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


def train_locally(recipe: str, overrides: Sequence[str], run: Path, ranks: int) -> int:
    """Run :func:`local_command` to its end; a rank that dies ends the others."""
    environment = os.environ | rank_environment(ranks)
    process = subprocess.Popen(local_command(recipe, overrides, run, ranks), env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()
