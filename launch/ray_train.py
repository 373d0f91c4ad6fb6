"""Trains under Ray: Ray Train starts one worker a rank, watches them, and starts a new group when one dies.

In: a recipe, a run folder, a number of ranks. Out: the run folder filled. A new worker group resumes from the run
folder's last whole checkpoint, so a failure costs the steps since then and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class LaunchError(RuntimeError):
    """A run that could not be finished; the message carries the failing rank's own words."""


def train_on_ray(
    recipe_file: Path,
    run: Path,
    ranks: int,
    *,
    failures: int = 0,
    threads_per_rank: int | None = None,
    use_gpu: bool | None = None,
) -> None:
    """Train the recipe in ``recipe_file`` into ``run`` on ``ranks`` Ray workers. Needs an initialised Ray.

    ``failures`` is how many times a dead worker group may be replaced. Both paths must be readable from every node.
    Raises :class:`LaunchError` when the run fails for good.
    """
    import ray
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = ray.cluster_resources()
    gpu = resources.get("GPU", 0) >= ranks if use_gpu is None else use_gpu
    if not gpu and resources.get("CPU", 0) < ranks:
        raise LaunchError(
            f"{ranks} ranks need {ranks} CPUs of Ray, {resources.get('CPU', 0):g} are there: use fewer ranks or "
            "add nodes"
        )
    threads = threads_per_rank or max(1, int(resources.get("CPU", 1)) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    train: Any = ray.train  # untyped: its annotations name these classes and their older namesakes by turns
    run_config = train.RunConfig(
        name="ray",
        storage_path=str(run.resolve()),
        failure_config=train.FailureConfig(max_failures=failures),
        worker_runtime_env={"env_vars": environment},
    )
    trainer = TorchTrainer(
        _train_on_this_worker,
        train_loop_config={"recipe": str(recipe_file.resolve()), "run": str(run.resolve())},
        scaling_config=train.ScalingConfig(
            num_workers=ranks, use_gpu=gpu, resources_per_worker={"CPU": 1} | ({"GPU": 1} if gpu else {})
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=600),
        run_config=run_config,
    )
    try:
        trainer.fit()
    except Exception as error:
        raise LaunchError(f"training into {run} failed: {_root_cause(error)}") from error


def _train_on_this_worker(config: dict[str, Any]) -> None:
    # Ray sets the process group's variables; DeepSpeed insists on reading them.
    import ray.train

    from pipeline.training import train
    from recipes.schema import load_recipe

    context = ray.train.get_context()
    os.environ.setdefault("RANK", str(context.get_world_rank()))
    os.environ.setdefault("LOCAL_RANK", str(context.get_local_rank()))
    os.environ.setdefault("WORLD_SIZE", str(context.get_world_size()))
    train(load_recipe(config["recipe"]), config["run"])


def _root_cause(error: BaseException) -> str:
    """The first failing worker's message, or the error's own."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = sorted(failures.items())[0]
        return f"rank {rank}: {failure}"
    return str(error)
