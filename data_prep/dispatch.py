"""Shards as Ray tasks: few at a time, each tried a few times, and none waited for in vain.

In: the shards to write. Out: a :class:`Turn` a second and whenever a shard is done. Only paths, places and records
travel through Ray, never a file's bytes. Ray itself repeats nothing: whether a failure may pass is decided here, where
a shard that was finished before its result got lost is found on the disk.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.failure import PreparationError, is_full
from data_prep.shard import ShardRecord, finished_record, write_shard
from data_prep.shard_plan import Settings, ShardTask
from pipeline.data.storage import is_remote

IN_FLIGHT_PER_CPU = 2  # enough to keep the workers busy; the rest waits here and not in Ray's queue
MOST_AT_ONE_FILE = 4  # failures of a shard
MOST_FAILURES = 16  # of a shard
FIRST_PAUSE = 0.5  # seconds before a shard is tried again; doubles each time
TURN_SECONDS = 1.0
RESOURCES_EVERY = 10.0  # seconds between two looks at how many CPUs the cluster has
CANCEL_SECONDS = 10.0  # for workers to leave what they do


@dataclass(frozen=True)
class Job:
    """What all shards of a preparation have in common."""

    out: Path | str  # a folder or a URL
    workspace: Path  # on the folder's file system, where every machine sees it; each its own for a URL
    settings: Settings
    classes: dict[str, int]
    plan: str


@dataclass(frozen=True)
class Turn:
    """What happened since the last turn."""

    finished: list[tuple[ShardTask, ShardRecord]]
    under_way: list[tuple[ShardTask, int]]  # shards being written, and how many of their files are done


def write_shards(job: Job, tasks: list[ShardTask], workers: int | None, ray_address: str | None) -> Generator[Turn]:
    """Write ``tasks``, at most ``workers`` of them at once, by default two a CPU of the cluster at ``ray_address``,
    or of a Ray that is started here.

    A shard whose worker or machine dies, or whose disk fails, is written again, :data:`MOST_AT_ONE_FILE` times at most
    if it is at the same file.
    Raises :class:`PreparationError` for a shard that can't be written, the worker's ``OSError`` if the disk is full,
    and ``ConnectionError`` if Ray itself is gone.
    """
    import ray

    from pipeline.ray_session import RayWatch, ray_session

    with ray_session(ray_address, cpus=workers) as resources:
        watch = RayWatch(head_returns=ray_address is not None)
        remote = ray.remote(_write).options(max_retries=0)
        queue, retries = deque(tasks), _Retries(job)
        running: dict[Any, ShardTask] = {}
        looked = time.monotonic()
        try:
            while queue or retries.waiting or running:
                watch.check()
                if time.monotonic() - looked > RESOURCES_EVERY:  # machines come and go
                    resources, looked = ray.cluster_resources(), time.monotonic()
                at_once = workers or IN_FLIGHT_PER_CPU * max(1, int(resources.get("CPU", 1)))
                queue.extendleft(retries.due())
                while queue and len(running) < at_once:
                    task = queue.popleft()
                    running[remote.remote(job, task, retries.suspects(task))] = task
                if not running:
                    time.sleep(FIRST_PAUSE / 2)
                    continue
                done, _ = ray.wait(list(running), num_returns=1, timeout=TURN_SECONDS)
                finished = []
                for reference in done:
                    task = running.pop(reference)
                    try:
                        finished.append((task, ray.get(reference)))
                    except ray.exceptions.RayError as error:
                        record = retries.failed(task, error)
                        if record is not None:
                            finished.append((task, record))
                yield Turn(finished, [(task, _place(job, task)) for task in running.values()])
        finally:
            _cancel(list(running))


def _write(job: Job, task: ShardTask, suspects: list[int]) -> ShardRecord:
    """Write one shard, in a Ray worker, and note in the workspace which file is next: who dies can't say it later."""
    if is_remote(job.out):
        job.workspace.mkdir(parents=True, exist_ok=True)
    with _marker(job, task).open("wb", buffering=0) as marker:

        def report(place: int) -> None:
            os.pwrite(marker.fileno(), place.to_bytes(8, "little"), 0)

        return write_shard(job.out, job.workspace, task, job.settings, job.classes, job.plan, report, suspects)


def _marker(job: Job, task: ShardTask) -> Path:
    return job.workspace / f"{task.split}-{task.number:06d}.next"


def _place(job: Job, task: ShardTask) -> int:
    """How many of the task's files its worker is through with."""
    try:
        return min(len(task.files), int.from_bytes(_marker(job, task).read_bytes(), "little"))
    except OSError:  # not begun
        return 0


@dataclass
class _Retries:
    """The shards that failed, until they are due again."""

    job: Job
    waiting: list[tuple[float, ShardTask]] = field(default_factory=list)
    failures: dict[str, list[int]] = field(default_factory=dict)  # by shard, the place of the file at each
    deaths: dict[str, set[int]] = field(default_factory=dict)  # the same where the worker died

    def suspects(self, task: ShardTask) -> list[int]:
        """Places of files at which a worker of this shard has died."""
        return sorted(self.deaths.get(task.stem, ()))

    def due(self) -> list[ShardTask]:
        """Those to try now."""
        now = time.monotonic()
        ready = [task for when, task in self.waiting if when <= now]
        self.waiting = [(when, task) for when, task in self.waiting if when > now]
        return ready

    def failed(self, task: ShardTask, error: Exception) -> ShardRecord | None:
        """Note a failure to try again later; returns the record if the shard was finished nevertheless."""
        from ray.exceptions import RayTaskError

        cause = error.cause if isinstance(error, RayTaskError) else error
        if is_full(cause):
            raise cause from error
        if not self.job.workspace.is_dir():
            raise PreparationError(
                f"another preparation of {self.job.out} has begun and this one gives way: let one run at a time"
            ) from error
        record = finished_record(self.job.out, task, self.job.plan)
        if record is not None:
            return record
        place, died = _place(self.job, task), not isinstance(error, RayTaskError)
        places = self.failures.setdefault(task.stem, [])
        places.append(place)
        if died:
            self.deaths.setdefault(task.stem, set()).add(place)
        too_many = places.count(place) >= MOST_AT_ONE_FILE or len(places) >= MOST_FAILURES
        if too_many or not (died or isinstance(cause, OSError)):
            raise PreparationError(self._explain(task, cause, died)) from error
        self.waiting.append((time.monotonic() + FIRST_PAUSE * 2 ** (places.count(place) - 1), task))
        return None

    def _explain(self, task: ShardTask, cause: Exception, died: bool) -> str:
        places = self.failures[task.stem]
        at = f" at {task.files[places[-1]].name}" if places[-1] < len(task.files) else ""
        reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        if died:
            remedy = "remove that file if it is always the same, or use fewer --workers if memory is short"
        elif isinstance(cause, FileNotFoundError):
            remedy = "every machine of the cluster must see SOURCE and OUT under the same paths"
        else:
            remedy = "see to it"
        return (
            f"shard {task.stem} can't be written, {len(places)} attempt{'s' * (len(places) > 1)} failed, the last{at} "
            f"with {type(cause).__name__}: {reason}: {remedy}, then repeat the command, it goes on from the finished "
            "shards"
        )


def _cancel(references: list[Any]) -> None:
    """Stop what still runs, so that nothing is written after the preparation has ended."""
    import ray

    with suppress(ray.exceptions.RayError, ConnectionError):
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references), timeout=CANCEL_SECONDS)
