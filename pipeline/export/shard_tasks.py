"""Work on a data set's shards by a trained model, one Ray task a shard.

In: a function and the shards. Out: its results. A worker keeps the model for its next shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pipeline.training.checkpoint import MANIFEST
from pipeline.training.run_folder import Run

IN_FLIGHT_PER_CPU = 2
_Task = TypeVar("_Task", bound=Hashable)


def on_shards(function: Callable[..., Any], tasks: Sequence[_Task], *common: Any) -> dict[_Task, Any]:
    """``function(*common, task)`` of every task, in Ray's workers. Uses a running Ray or starts one."""
    import ray
    from ray.exceptions import RayTaskError

    from pipeline.ray_session import ray_session

    results: dict[_Task, Any] = {}
    with ray_session() as resources:
        remote = ray.remote(function).options(max_retries=2)
        at_once = IN_FLIGHT_PER_CPU * max(1, int(resources.get("CPU", 1)))
        waiting, running = iter(tasks), {}
        while True:
            for task in waiting:
                running[remote.remote(*common, task)] = task
                if len(running) >= at_once:
                    break
            if not running:
                return results
            done, _ = ray.wait(list(running), num_returns=1)
            for reference in done:
                try:
                    results[running.pop(reference)] = ray.get(reference)
                except RayTaskError as error:
                    raise error.cause or error from error  # what went wrong, without Ray's frames around it


def hash_of(checkpoint: Path) -> str:
    """What names a model wherever it lies: the SHA-256 of its checkpoint's manifest, which holds those of its files."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def load_for_shards(run: Path, checkpoint: Path, raw: bool) -> tuple[Any, Any]:
    """The model, with its averaged weights unless ``raw``, and the recipe, from memory if this worker has them.

    A worker outlives a call, and by the next another run may lie at the same path: content names the model.
    """
    recipe = hashlib.sha256(Run(run).recipe_file.read_bytes()).hexdigest()
    return _load_once(run, checkpoint, raw, hash_of(checkpoint), recipe)


@lru_cache(maxsize=1)
def _load_once(run: Path, checkpoint: Path, raw: bool, model_hash: str, recipe_hash: str) -> tuple[Any, Any]:
    import torch

    torch.set_num_threads(1)  # one Ray CPU, one thread
    return Run(run).load_model(checkpoint, raw=raw)
