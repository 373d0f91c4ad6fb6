"""Trains under Ray: Ray Train starts one worker a rank, watches them, and starts a new group when one dies.

In: a recipe, a run folder, a number of ranks. Out: the run folder filled. A new worker group resumes from the run
folder's last whole checkpoint, so a failure costs the steps since then and nothing else. Signals to stop reach the
workers as a file in the run folder.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.ray_places import JOIN_SECONDS, Places
from launch.stop_file import StopFile
from pipeline.training.checkpoint import MANIFEST, checkpoint_name

logger = logging.getLogger("tessera")

END_SECONDS = 120.0
"""How long Ray may take to end its workers after the run's last checkpoint is whole."""
UNHEARD_SECONDS = 5.0
"""How long a signal to stop waits for workers that have no places on the cluster yet, and so read no file."""
_LOOK_EVERY = 0.5  # seconds


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
) -> bool:
    """Train the recipe in ``recipe_file`` into ``run`` on ``ranks`` Ray workers. Needs an initialised Ray.

    ``failures`` is how many times a dead worker group may be replaced. Both paths must be readable from every node.
    Where the cluster has GPUs each rank gets one, unless ``use_gpu`` says otherwise. While the workers have no places
    on the cluster, the log says every 30 seconds what they wait for.
    Returns False when a signal stopped the run, which has saved its state and goes on when it is started again. Raises
    :class:`LaunchError` when the run fails for good, ConnectionError when Ray itself is gone.
    """
    import ray
    from ray.train.torch import TorchTrainer

    from launch.ray_network import NetworkConfig
    from recipes.schema import load_recipe

    training = load_recipe(recipe_file).training
    # Not "as many as ranks": with a node away, a run on GPUs would go on without them.
    gpu = ray.cluster_resources().get("GPU", 0) > 0 if use_gpu is None else use_gpu
    worker = {"CPU": 1.0} | ({"GPU": 1.0} if gpu else {})
    places = Places(ranks, worker)
    if shortage := places.wait_for_nodes(JOIN_SECONDS):
        raise LaunchError(f"{shortage}: use fewer ranks or add nodes")
    threads = threads_per_rank or max(1, int(ray.cluster_resources().get("CPU", 1)) // ranks)
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
        scaling_config=train.ScalingConfig(num_workers=ranks, use_gpu=gpu, resources_per_worker=worker),
        torch_config=NetworkConfig(backend="nccl" if gpu else "gloo", timeout_s=training.collective_timeout),
        run_config=run_config,
    )
    last = run / "checkpoints" / checkpoint_name(training.steps) / MANIFEST
    _fit(trainer, run, last, places)
    return last.is_file()


def _fit(trainer: Any, run: Path, last: Path, places: Places) -> None:
    """``trainer.fit()``, which must neither swallow a signal nor keep this process for good."""
    from pipeline.ray_session import RayWatch

    errors: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            errors.append(error)

    # A thread: in the main one Ray Train takes SIGINT for itself, and no other signal would be handled while it waits.
    thread = threading.Thread(target=fit, name="tessera-ray-train", daemon=True)
    watch = RayWatch(head_returns=True)
    patience, unheard = END_SECONDS, 0.0
    with StopFile(run) as stop, places:
        thread.start()
        while thread.is_alive() and patience > 0:
            thread.join(_LOOK_EVERY)
            watch.check()
            if places.problem:
                raise LaunchError(places.problem)
            stop.pass_on()
            unheard = unheard + _LOOK_EVERY if stop.wanted and not places.taken else 0.0
            if unheard >= UNHEARD_SECONDS:
                return  # Ray forgets what was asked of it when this process ends
            if last.is_file():
                patience -= _LOOK_EVERY
    if thread.is_alive():
        logger.warning(
            "the run is complete, but Ray has not ended its workers in %.0f seconds: left alone", END_SECONDS
        )
    elif errors:
        raise LaunchError(f"training into {run} failed: {_root_cause(errors[0])}") from errors[0]


def _train_on_this_worker(config: dict[str, Any]) -> None:
    # Ray sets the process group's variables; DeepSpeed insists on reading them.
    import ray.train

    from pipeline import collectives
    from pipeline.training import train
    from pipeline.training.stop import Interrupted
    from recipes.schema import load_recipe

    context = ray.train.get_context()
    os.environ.setdefault("RANK", str(context.get_world_rank()))
    os.environ.setdefault("LOCAL_RANK", str(context.get_local_rank()))
    os.environ.setdefault("WORLD_SIZE", str(context.get_world_size()))
    with suppress(Interrupted):  # no failure: Ray Train would start a new group
        train(load_recipe(config["recipe"]), config["run"])
    collectives.leave()  # Ray would too, but waits a minute and more for a rank that has trouble with it


def _root_cause(error: BaseException) -> str:
    """The first failing worker's message, or the error's own."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = sorted(failures.items())[0]
        return f"rank {rank}: {failure}"
    return str(error)
