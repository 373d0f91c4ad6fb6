"""Starts a run: checks everything that can be checked before a process starts, then hands it to what runs the ranks.

In: a recipe, overrides, a run folder and where to run. Out: an exit code, or with ``dry_run`` the text of what would
run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import files, local
from pipeline.training.stop import RESUME_ME, SIGNALS

if TYPE_CHECKING:
    from recipes.schema import Recipe


def start_locally(
    recipe_name: str, overrides: Sequence[str], run: Path, ranks: int | None, *, profile: bool = False
) -> int:
    """`tessera train`: ranks of this machine under torchrun, progress on the terminal."""
    from launch.follow import Follow
    from pipeline.training.run_folder import Run

    ranks = ranks or _default_ranks()
    recipe = check_run(recipe_name, overrides, run, ranks)
    before = Run(run).list_checkpoints()
    with Follow(run, recipe):
        code = local.train_locally(recipe_name, overrides, run, ranks, recipe.training.steps, profile=profile)
    if code == RESUME_ME:
        print(f"stopped before its end; the same command goes on from {run}")
    if code == 0 and before and Run(run).list_checkpoints() == before:
        print(f"nothing is left to train: {run} has its steps; a higher training.steps trains on")
    elif code == 0:
        print(f"trained into {run}; next: tessera evaluate {run}, tessera report {run}")
    return code


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What `tessera launch` is asked for."""

    backend: str
    recipe_name: str
    overrides: Sequence[str]
    run: Path
    nodes: int
    ranks_per_node: int
    gpus: bool
    failures: int
    """Dead worker groups that Ray may replace."""
    ray_address: str | None
    hostfile: Path | None
    image: str
    """The container's, on Kubernetes."""
    time_limit: str
    sbatch_options: Sequence[str]
    dry_run: bool

    @property
    def ranks(self) -> int:
        """On all nodes."""
        return self.nodes * self.ranks_per_node

    def job(self, recipe: Recipe, run: Path) -> files.Job:
        """What a generated file or command needs to know; ``run`` as the nodes name it."""
        return files.Job(recipe.name, self.recipe_name, self.overrides, run, self.nodes, self.ranks_per_node, self.gpus)


def start(launch: Launch) -> int:
    """`tessera launch`: the same recipe on a backend. Raises RecipeError or ValueError before anything starts."""
    backend, run = launch.backend, launch.run
    if backend == "local" and launch.nodes != 1:
        raise ValueError(
            f"--nodes {launch.nodes} with --on local: local is this machine alone, use --nodes 1 or another --on"
        )
    if backend in ("local", "hostfile") and not launch.gpus:
        raise ValueError(f"--no-gpus with --on {backend}: it trains on what its machines have; leave the option out")
    if backend == "kubernetes":
        return _start_on_kubernetes(launch)

    recipe = check_run(launch.recipe_name, launch.overrides, run, launch.ranks)
    if backend == "local":
        if not launch.dry_run:
            return start_locally(launch.recipe_name, launch.overrides, run, launch.ranks)
        print(shlex.join(local.local_command(launch.recipe_name, launch.overrides, run, launch.ranks)))
        return 0
    if backend == "ray":
        return _start_on_ray(launch, recipe)
    job = launch.job(recipe, run.absolute())
    if backend == "hostfile":
        hosts = files.read_hostfile(launch.hostfile, launch.nodes, launch.ranks_per_node)
        command = files.deepspeed_command(job, hosts)
        if not launch.dry_run:
            from launch.hosts import train_on_hosts

            return train_on_hosts(command, job.run, recipe)
        print(f"PDSH_SSH_ARGS_APPEND={shlex.quote(files.SSH_OPTIONS)} {shlex.join(command)}")
        return 0
    script = files.sbatch_script(job, launch.time_limit, launch.sbatch_options)
    return _hand_over(script, ["sbatch"], launch.dry_run, job.run)


def _start_on_kubernetes(launch: Launch) -> int:
    """The paths are those of the pods: nothing is looked for on this machine but the recipe."""
    from pipeline.data.storage import is_remote
    from recipes.schema import load_recipe

    recipe = load_recipe(launch.recipe_name, launch.overrides)
    recipe.check_ranks(launch.ranks)
    shared = [launch.run, *(Path(source.path) for source in recipe.data_sources if not is_remote(source.path))]
    if Path(launch.recipe_name).is_file():
        shared.append(Path(launch.recipe_name))
    manifest = files.ray_job_manifest(launch.job(recipe, launch.run), shared, launch.failures, launch.image)
    return _hand_over(manifest, ["kubectl", "create", "-f", "-"], launch.dry_run)


def check_run(recipe_name: str, overrides: Sequence[str], run: Path, ranks: int):
    """The recipe, after everything that can refuse the run has been asked. Raises RecipeError."""
    from pipeline.training.run_folder import Run
    from recipes.schema import load_recipe

    recipe = load_recipe(recipe_name, overrides)
    recipe.check_ranks(ranks)
    recipe.check_data()
    if run.exists() and not run.is_dir():
        raise ValueError(f"--run {run} is a file: give a folder")
    folder = Run(run)
    folder.check_recipe(recipe)
    return recipe


def _start_on_ray(launch: Launch, recipe: Recipe) -> int:
    run = launch.run
    if launch.dry_run:
        where = launch.ray_address or "this machine"
        print(
            f"Ray Train on {where}: {launch.ranks} workers, up to {launch.failures} restarts, recipe {recipe.name}, "
            f"run folder {run}"
        )
        return 0
    from launch.follow import Follow
    from launch.ray_train import train_on_ray
    from launch.stop_file import StopFile
    from pipeline.ray_session import ray_session

    run.mkdir(parents=True, exist_ok=True)
    recipe_file = run / "launched.yaml"
    recipe_file.write_text(recipe.to_yaml())
    follow = Follow(run, recipe, warnings=True)
    gpu = None if launch.gpus else False
    # The first to open and the last to close: no signal meets another handler while Ray starts or ends.
    with StopFile(run) as stop, ray_session(launch.ray_address), follow:
        finished = train_on_ray(recipe_file, run, launch.ranks, stop, failures=launch.failures, use_gpu=gpu)
    if finished:
        return 0
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all that is left is to end, with a code that is not theirs
    print(f"stopped before its end; the same command goes on from {run}")
    return RESUME_ME


def _hand_over(text: str, command: Sequence[str], dry_run: bool, folder: Path | None = None) -> int:
    """Give ``command`` the text to read, once ``folder`` is there; or print the text and what it would be given to."""
    if dry_run:
        make = f"mkdir -p {shlex.quote(str(folder))} && " if folder else ""
        print(f"{text}\n# tessera launch gives this file to: {make}{shlex.join(command)}")
        return 0
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]} is not on this machine: run this where it is, or add --dry-run to see what would run"
        )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # Slurm does not make the folder of its log
    return subprocess.run(command, input=text, text=True, check=False).returncode


def _default_ranks() -> int:
    """One rank a GPU, or one. CUDA_VISIBLE_DEVICES and nvidia-smi answer without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return max(1, len(listed.splitlines()))
