"""Trains on the hosts of a hostfile: DeepSpeed's runner starts the ranks over pdsh and ssh.

In: the runner's command, a run folder that all hosts see, the recipe. Out: the exit code of the run. A signal reaches
the ranks as a file in the run folder, a second one makes the runner end them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch.files import SSH_OPTIONS
from launch.follow import Follow
from launch.stop_file import StopFile
from pipeline.training.checkpoint import checkpoint_name
from pipeline.training.stop import RESUME_ME
from recipes.schema import Recipe

_LOOK_EVERY = 0.5  # seconds


def train_on_hosts(command: Sequence[str], run: Path, recipe: Recipe) -> int:
    """Run ``command`` until it ends: 0 is a run that reached its last step, :data:`RESUME_ME` one that was stopped and
    has saved, anything else a failure.

    Raises ValueError where pdsh or ssh is missing.
    """
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise ValueError(
                f"{program} is not on this machine: install it, or use --dry-run to see what would run where it is"
            )
    run.mkdir(parents=True, exist_ok=True)
    options = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    with StopFile(run) as stop, Follow(run, recipe):
        # A session of its own: Ctrl-C is for us, and pdsh would take it for itself.
        runner = subprocess.Popen(command, env=os.environ | {"PDSH_SSH_ARGS_APPEND": options}, start_new_session=True)
        code, ended = None, False
        while code is None:
            try:
                code = runner.wait(_LOOK_EVERY)
            except subprocess.TimeoutExpired:
                stop.pass_on()
                if stop.signals > 1 and not ended:
                    runner.terminate()
                    ended = True
    if (run / "checkpoints" / checkpoint_name(recipe.training.steps)).is_dir():
        print(f"trained into {run}; next: tessera evaluate {run}, tessera report {run}")
        return 0
    if code == RESUME_ME:
        print(f"stopped before its end; the same command goes on from {run}")
    return code or 1  # the runner calls it 0 when a signal ended pdsh
