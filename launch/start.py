"""Starts a run: checks everything that can be checked before a process starts, then hands it to what runs the ranks.

In: a recipe, overrides, a run folder and where to run. Out: an exit code, or with ``dry_run`` the text of what would
run.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from launch import files, local
from pipeline.training.stop import RESUME_ME


def start_locally(
    recipe_name: str, overrides: Sequence[str], run: Path, ranks: int | None, *, profile: bool = False
) -> int:
    """`tessera train`: ranks of this machine under torchrun, progress on the terminal."""
    from launch.follow import Follow

    ranks = ranks or _default_ranks()
    recipe = check_run(recipe_name, overrides, run, ranks)
    with Follow(run, recipe.training.steps, recipe.name):
        code = local.train_locally(recipe_name, overrides, run, ranks, recipe.training.steps, profile=profile)
    if code == RESUME_ME:
        print(f"stopped before its end; the same command goes on from {run}")
    if code == 0:
        print(f"trained into {run}; next: tessera evaluate {run}, tessera report {run}")
    return code


def start(
    backend: str,
    recipe_name: str,
    overrides: Sequence[str],
    run: Path,
    *,
    nodes: int,
    ranks_per_node: int,
    failures: int,
    ray_address: str | None,
    hostfile: Path | None,
    image: str,
    time_limit: str,
    dry_run: bool,
) -> int:
    """`tessera launch`: the same recipe on a backend. Raises RecipeError or ValueError before anything starts."""
    ranks = nodes * ranks_per_node
    if backend == "local":
        if nodes != 1:
            raise ValueError(
                f"--nodes {nodes} with --on local: local is this machine alone, use --nodes 1 or another --on"
            )
        if dry_run:
            check_run(recipe_name, overrides, run, ranks)
            print(shlex.join(local.local_command(recipe_name, overrides, run, ranks)))
            return 0
        return start_locally(recipe_name, overrides, run, ranks)

    recipe = check_run(recipe_name, overrides, run, ranks)
    if backend == "ray":
        return _start_on_ray(recipe, run, ranks, failures, ray_address, dry_run)
    if backend == "hostfile":
        hosts = files.read_hostfile(hostfile, nodes, ranks_per_node)
        command = files.deepspeed_command(hosts, recipe_name, overrides, run, nodes, ranks_per_node)
        return _run_or_show(command, "", dry_run)
    if backend == "slurm":
        script = files.sbatch_script(recipe.name, recipe_name, overrides, run, nodes, ranks_per_node, time_limit)
        file = run / "job.sbatch"
        return _run_or_show(["sbatch", str(file)], script, dry_run, file)
    manifest = files.ray_job_manifest(recipe.name, recipe_name, overrides, run, nodes, ranks_per_node, failures, image)
    file = run / "rayjob.yaml"
    return _run_or_show(["kubectl", "create", "-f", str(file)], manifest, dry_run, file)


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


def _start_on_ray(recipe, run: Path, ranks: int, failures: int, ray_address: str | None, dry_run: bool) -> int:
    if dry_run:
        where = ray_address or "this machine"
        print(
            f"Ray Train on {where}: {ranks} workers, up to {failures} restarts, recipe {recipe.name}, run folder {run}"
        )
        return 0
    from launch.follow import Follow
    from launch.ray_train import train_on_ray
    from pipeline.ray_session import ray_session

    run.mkdir(parents=True, exist_ok=True)
    recipe_file = run / "launched.yaml"
    recipe_file.write_text(recipe.to_yaml())
    with ray_session(ray_address), Follow(run, recipe.training.steps, recipe.name, warnings=True):
        finished = train_on_ray(recipe_file, run, ranks, failures=failures)
    if not finished:
        print(f"stopped before its end; the same command goes on from {run}")
    return 0 if finished else RESUME_ME


def _run_or_show(command: Sequence[str], text: str, dry_run: bool, file: Path | None = None) -> int:
    """Print the file and the command, or write the one and run the other."""
    if dry_run:
        if text:
            print(text)
        print(("# " if text else "") + shlex.join(command))
        return 0
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]} is not on this machine: run this where it is, or add --dry-run to see what would run"
        )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return subprocess.run(command, check=False).returncode


def _default_ranks() -> int:
    """One rank a GPU, or one. CUDA_VISIBLE_DEVICES and nvidia-smi answer without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    if shutil.which("nvidia-smi") is None:
        return 1
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False).stdout
    return max(1, len(listed.splitlines()))
