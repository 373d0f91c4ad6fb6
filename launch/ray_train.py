"""Trains under Ray: Ray Train starts one worker a rank, watches them, and starts a new group when one dies.

In: a recipe, a run folder, a number of ranks. Out: the run folder filled. A new worker group resumes from the run
folder's last whole checkpoint, so a failure costs the steps since then and nothing else. Signals to stop reach the
workers as a file in the run folder.

Ray Train's own loop runs in a Ray task. It waits within Ray for as long as the run takes, and Ray ends a process at
once, with code 1, when it is shut down while a thread of it waits so. The launcher only ever looks and sleeps: it can
leave at any time with the right code, and what it leaves ends with its job on the cluster.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.ray_places import JOIN_SECONDS, Places
from launch.stop_file import StopFile
from pipeline.training.checkpoint import MANIFEST, checkpoint_name

if TYPE_CHECKING:
    from ray import ObjectRef

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
    stop: StopFile,
    *,
    failures: int = 0,
    threads_per_rank: int | None = None,
    use_gpu: bool | None = None,
) -> bool:
    """Train the recipe in ``recipe_file`` into ``run`` on ``ranks`` Ray workers. Needs an initialised Ray.

    ``stop`` is open and of the same run. ``failures`` is how many times a dead worker group may be replaced. Both paths
    must be readable from every node. Where the cluster has GPUs each rank gets one, unless ``use_gpu`` says otherwise.
    While the workers have no places on the cluster, the log says every 30 seconds what they wait for.
    Returns False when a signal stopped the run, which has saved its state and goes on when it is started again. Raises
    :class:`LaunchError` when the run fails for good, ConnectionError when Ray itself is gone. What then still waits or
    runs on the cluster ends with this process's Ray session.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from recipes.schema import load_recipe

    training = load_recipe(recipe_file).training
    # Not "as many as ranks": with a node away, a run on GPUs would go on without them.
    gpu = ray.cluster_resources().get("GPU", 0) > 0 if use_gpu is None else use_gpu
    worker = {"CPU": 1.0} | ({"GPU": 1.0} if gpu else {})
    places = Places(ranks, worker)
    last = run / "checkpoints" / checkpoint_name(training.steps) / MANIFEST
    shortage = places.wait_for_nodes(JOIN_SECONDS, lambda: stop.wanted)
    if stop.wanted:
        return last.is_file()
    if shortage:
        raise LaunchError(f"{shortage}: use fewer ranks or add nodes")
    threads = threads_per_rank or max(1, int(ray.cluster_resources().get("CPU", 1)) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),  # see pipeline.training.__main__
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    fit: Any = ray.remote(_fit)
    running = fit.options(num_cpus=0, max_retries=0, scheduling_strategy=here).remote(
        recipe_file.resolve(), run.resolve(), ranks, worker, environment, failures, training.collective_timeout
    )
    _wait(running, run, last, places, stop)
    return last.is_file()


def _wait(running: ObjectRef[None], run: Path, last: Path, places: Places, stop: StopFile) -> None:
    """Until the task has ended, or there is no more reason to wait for it."""
    import ray

    from pipeline.ray_session import RayWatch

    watch = RayWatch(head_returns=True)
    patience, unheard = END_SECONDS, 0.0
    with places:
        while not ray.wait([running], timeout=_LOOK_EVERY)[0]:
            watch.check()
            if places.problem:
                raise LaunchError(places.problem)
            stop.pass_on()
            unheard = unheard + _LOOK_EVERY if stop.wanted and not places.taken else 0.0
            if unheard >= UNHEARD_SECONDS:
                return
            if last.is_file():
                patience -= _LOOK_EVERY
            if patience <= 0:
                logger.warning(
                    "the run is complete, but Ray has not ended its workers in %.0f seconds: left alone", END_SECONDS
                )
                return
    try:
        ray.get(running)
    except Exception as error:
        raise LaunchError(f"training into {run} failed: {_root_cause(error)}") from error


def _fit(
    recipe_file: Path,
    run: Path,
    ranks: int,
    worker: dict[str, float],
    environment: dict[str, str],
    failures: int,
    timeout: int,
) -> None:
    """In a Ray task: all of the run's worker groups. ``worker`` is what each rank gets, ``timeout`` in seconds."""
    import ray.train
    from ray.train.torch import TorchTrainer

    from launch.ray_network import NetworkConfig

    gpu = "GPU" in worker
    train: Any = ray.train  # untyped: its annotations name these classes and their older namesakes by turns
    trainer = TorchTrainer(
        _train_on_this_worker,
        train_loop_config={"recipe": str(recipe_file), "run": str(run)},
        scaling_config=train.ScalingConfig(num_workers=ranks, use_gpu=gpu, resources_per_worker=worker),
        torch_config=NetworkConfig(backend="nccl" if gpu else "gloo", timeout_s=timeout),
        run_config=train.RunConfig(
            name="ray",
            storage_path=str(run),
            failure_config=train.FailureConfig(max_failures=failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    trainer.fit()


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
    """The first failing worker's message, or that of what ended the task."""
    error = getattr(error, "cause", None) or error
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = sorted(failures.items())[0]
        return f"rank {rank}: {failure}"
    return str(error)
