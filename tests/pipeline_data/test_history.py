"""Histories of training, with real tensors: ranks come and go, start and die at any step, with any number of threads.
The global batches are bit for bit those of one rank that nothing disturbed, and an epoch takes each sample once.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import (
    BatchConfig,
    DataConfig,
    ImageCollation,
    MaskingConfig,
    SamplingPlan,
    ShardedDataset,
    SpeechCollation,
    build_loader,
    open_data,
)
from pipeline.data.collation import Collation
from tests.pipeline_data.shards import reshard

LAYERS = [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2]
MICRO_BATCHES = 6
WORLDS = [1, 2, 3, 6]
BATCHES = {
    "speech": BatchConfig(micro_batches=MICRO_BATCHES, seconds=8),
    "image": BatchConfig(micro_batches=MICRO_BATCHES, samples=3),
}
Digests = dict[tuple[int, int], tuple[str, list[str]]]  # step and micro-batch → hash of all tensors, keys


def configured(paths: list[Path], window_shards: int) -> DataConfig:
    mix = [{"path": path, "weight": 1 + place} for place, path in enumerate(paths)]
    which = {"path": paths[0]} if len(paths) == 1 else {"mix": mix}
    return DataConfig.model_validate({"max_seconds": 2.5, "image_size": 16, "window_shards": window_shards, **which})


def collation_of(kind: str, data: DataConfig) -> Collation:
    if kind == "speech":
        return SpeechCollation(data, MaskingConfig(negatives=4), LAYERS, seed=3)
    return ImageCollation(data, seed=3)


def digest(batch: object) -> tuple[str, list[str]]:
    hashed = hashlib.sha256()
    for value in vars(batch).values():
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype} {tuple(value.shape)}".encode() + value.numpy().tobytes())
    return hashed.hexdigest(), batch.keys  # type: ignore[attr-defined]


def read_steps(data: DataConfig, start: int, steps: int, rank: int, world: int, threads: int, ahead: int) -> Digests:
    """What a rank that starts at a step gets, before it dies with ``ahead`` steps decoded and never taken."""
    dataset = open_data(data)
    plan = SamplingPlan(dataset, BATCHES[dataset.kind], data, seed=3)
    found = {}
    with build_loader(
        dataset,
        plan,
        collation_of(dataset.kind, data),
        rank=rank,
        world_size=world,
        start_step=start,
        steps=steps + ahead,
        threads=threads,
        prefetch=1 + ahead,
    ) as loader:
        for _ in range(steps):
            found |= {(batch.step, batch.number): digest(batch) for batch in next(loader)}
    dataset.close()
    return found


@pytest.mark.parametrize("kind", ["speech", "image"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=2),
    window_shards=st.integers(1, 3),
    spans=st.lists(
        st.tuples(st.sampled_from(WORLDS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2)),
        min_size=1,
        max_size=4,
    ),
)
def test_any_history_gives_the_same_tensors(
    kind: str,
    speech_dataset: Path,
    image_dataset: Path,
    sizes: list[list[int]],
    window_shards: int,
    spans: list[tuple[int, int, int, int]],
) -> None:
    source = ShardedDataset(speech_dataset if kind == "speech" else image_dataset)
    with tempfile.TemporaryDirectory() as folder:
        paths = [reshard(source, Path(folder) / str(number), each) for number, each in enumerate(sizes)]
        data = configured(paths, window_shards)
        dataset = open_data(data)
        plan = SamplingPlan(dataset, BATCHES[kind], data, seed=3)
        total = sum(span for _, span, _, _ in spans)
        while min(plan.epochs(total)) < 1:
            total += 1
        undisturbed = read_steps(data, 0, total, rank=0, world=1, threads=1, ahead=0)
        found: Digests = {}
        step = 0
        for world, span, threads, ahead in spans:
            for rank in range(world):
                found |= read_steps(data, step, span, rank, world, threads, ahead)
            step += span
        assert found == {place: value for place, value in undisturbed.items() if place[0] < step}

        seen: list[list[str]] = [[] for _ in sizes]
        for place in sorted(undisturbed):
            references = plan.micro_batch(*place)
            keys = [dataset.sources[each.source].keys(each.index) for each in references]
            assert undisturbed[place][1] == keys
            seen[references[0].source] += [key for each, key in zip(references, keys, strict=True) if each.epoch == 0]
        for keys, each in zip(seen, dataset.sources, strict=True):
            assert sorted(keys) == sorted(each.keys(index) for index in range(len(each)))


def write_steps(data: DataConfig, start: int, rank: int, world: int, log: Path) -> None:
    """Run a rank for ever, noting each micro-batch when it is taken."""
    dataset = open_data(data)
    plan = SamplingPlan(dataset, BATCHES[dataset.kind], data, seed=3)
    collation = collation_of(dataset.kind, data)
    with log.open("a") as file:
        for item in build_loader(dataset, plan, collation, rank=rank, world_size=world, start_step=start):
            for batch in item:
                file.write(f"{batch.step} {batch.number} {digest(batch)[0]}\n")
            file.flush()
            time.sleep(0.01)


@pytest.mark.slow
def test_ranks_that_are_killed_go_on_elsewhere(speech_dataset: Path, tmp_path: Path) -> None:
    """Real processes, killed by SIGKILL at random moments; the next start has another number of them."""
    data = configured([speech_dataset], window_shards=2)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once
    generator = random.Random(0)
    found: dict[tuple[int, int], str] = {}
    step = 0
    for attempt, world in enumerate([2, 3, 1, 6, 2]):
        logs = [tmp_path / f"{attempt}-{rank}" for rank in range(world)]
        ranks = [
            context.Process(target=write_steps, args=(data, step, rank, world, log)) for rank, log in enumerate(logs)
        ]
        for rank in ranks:
            rank.start()
        while not all(log.exists() and log.stat().st_size for log in logs):
            time.sleep(0.05)
        time.sleep(generator.uniform(0, 1))
        for rank in generator.sample(ranks, world):
            os.kill(rank.pid, signal.SIGKILL)  # type: ignore[arg-type]
            rank.join()
        lines = [line.split() for log in logs for line in log.read_text().splitlines(keepends=True) if line[-1] == "\n"]
        noted = {(int(at), int(number)): value for at, number, value in lines}
        complete = step
        while all((complete, number) in noted for number in range(MICRO_BATCHES)):
            complete += 1
        # What a rank took of a step that others did not reach is taken again, and must be the same.
        again = {place: value for place, value in found.items() if place in noted}
        assert again == {place: noted[place] for place in again}
        found |= noted
        step = complete
    assert step > 20
    undisturbed = read_steps(data, 0, step, rank=0, world=1, threads=2, ahead=0)
    assert {place: value for place, value in found.items() if place[0] < step} == {
        place: value for place, (value, _) in undisturbed.items()
    }
