"""The loader: the same bits for any number of threads and ranks, from any step, with broken samples or without."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import (
    BatchConfig,
    DataConfig,
    ImageCollation,
    MaskingConfig,
    SamplingPlan,
    ShardedDataset,
    SpeechBatch,
    SpeechCollation,
    build_loader,
    epoch_batches,
)
from pipeline.data.collation import SampleError
from pipeline.data.loader import TooManyBadSamples

LAYERS = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
DATA = DataConfig(max_seconds=4.0)
BATCH = BatchConfig(micro_batches=6, seconds=12)
COLLATION = SpeechCollation(DATA, MaskingConfig(negatives=10), LAYERS, seed=1)


def parts(path: Path) -> tuple[ShardedDataset, SamplingPlan]:
    dataset = ShardedDataset(path)
    return dataset, SamplingPlan(dataset, BATCH, DATA, seed=1)


def stream(path: Path, steps: int, world_size: int = 1, start_step: int = 0, **options: int) -> list[SpeechBatch]:
    """The micro-batches of ``steps`` global batches in order, gathered from the loaders of all ranks."""
    dataset, plan = parts(path)
    found = {}
    for rank in range(world_size):
        with build_loader(
            dataset, plan, COLLATION, rank=rank, world_size=world_size, start_step=start_step, steps=steps, **options
        ) as loader:
            for item in loader:
                assert [batch.number for batch in item] == list(range(rank, BATCH.micro_batches, world_size))
                found |= {(batch.step, batch.number): batch for batch in item}
    return [found[place] for place in sorted(found)]


def assert_same(first: Iterable[SpeechBatch], second: Iterable[SpeechBatch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert (one.step, one.number, one.keys, one.targets) == (other.step, other.number, other.keys, other.targets)
        for name in ("waveforms", "lengths", "mask", "frame_lengths", "negatives"):
            assert torch.equal(getattr(one, name), getattr(other, name))


@pytest.fixture(scope="module")
def reference(speech_dataset: Path) -> list[SpeechBatch]:
    """Eight steps on one rank with one thread: over the border of the first epoch."""
    _, plan = parts(speech_dataset)
    steps = int(plan.steps_per_epoch) + 2
    return stream(speech_dataset, steps, threads=1, prefetch=1)


def steps_of(reference: list[SpeechBatch]) -> int:
    return len(reference) // BATCH.micro_batches


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 4), (2, 2), (3, 1), (4, 3), (7, 5)])
def test_threads_change_no_bit(speech_dataset: Path, reference: list[SpeechBatch], threads: int, prefetch: int) -> None:
    assert_same(stream(speech_dataset, steps_of(reference), threads=threads, prefetch=prefetch), reference)


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_ranks_change_no_bit(speech_dataset: Path, reference: list[SpeechBatch], world_size: int) -> None:
    assert_same(stream(speech_dataset, steps_of(reference), world_size=world_size), reference)


def test_images_are_the_same_for_any_threads_and_ranks(image_dataset: Path) -> None:
    dataset = ShardedDataset(image_dataset)
    data = DataConfig(image_size=48, resize=56)
    plan = SamplingPlan(dataset, BatchConfig(micro_batches=2, samples=20), data, seed=5)
    collation = ImageCollation(data, seed=5)

    def pixels(threads: int, world_size: int) -> list[torch.Tensor]:
        found = {}
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "threads": threads}
            for item in build_loader(dataset, plan, collation, steps=8, **options):
                found |= {(batch.step, batch.number): batch.pixels for batch in item}
        return [found[place] for place in sorted(found)]

    alone = pixels(threads=1, world_size=1)
    assert len(alone) == 16
    assert len({tuple(images[0].ravel().tolist()) for images in alone}) == 16
    for other in (pixels(threads=5, world_size=1), pixels(threads=2, world_size=2)):
        assert all(torch.equal(one, two) for one, two in zip(alone, other, strict=True))


def test_resuming_goes_on_as_if_nothing_had_happened(speech_dataset: Path, reference: list[SpeechBatch]) -> None:
    for start in (1, steps_of(reference) - 1):
        resumed = stream(speech_dataset, steps_of(reference) - start, world_size=2, start_step=start)
        assert_same(resumed, reference[start * BATCH.micro_batches :])


def test_each_clip_comes_once_an_epoch_and_differently_cropped_in_the_next(
    speech_dataset: Path, reference: list[SpeechBatch]
) -> None:
    _, plan = parts(speech_dataset)
    per_epoch = int(plan.micro_batches_per_epoch)
    dataset = ShardedDataset(speech_dataset)
    seen = sorted(key for batch in reference[:per_epoch] for key in batch.keys)
    assert seen == sorted(dataset.keys(index) for index in range(len(dataset)))
    rows = {}
    for place, batch in enumerate(reference):
        for row, key in enumerate(batch.keys):
            rows.setdefault(key, []).append((place // per_epoch, batch.waveforms[row], batch.mask[row]))
    twice = [found for found in rows.values() if len(found) > 1 and len(found[0][1]) >= DATA.max_samples]
    assert twice
    assert any(not torch.equal(first[1], second[1]) for first, second in twice)


def break_sample(source: Path, target: Path, victims: list[int]) -> list[str]:
    """Copy a data set and overwrite the encoded bytes of some samples; returns their keys."""
    shutil.copytree(source, target)
    dataset = ShardedDataset(target)
    for index in victims:
        shard = int(np.searchsorted(dataset.shard_starts, index, side="right")) - 1
        path = target / dataset.manifest.splits["train"].shards[shard].file
        content = dataset.read(index).content
        path.write_bytes(path.read_bytes().replace(content, b"\0" * len(content)))
    return [dataset.keys(index) for index in victims]


def test_a_broken_sample_is_replaced_the_same_way_everywhere(speech_dataset: Path, tmp_path: Path) -> None:
    keys = break_sample(speech_dataset, tmp_path / "broken", [3, 40])
    dataset, plan = parts(tmp_path / "broken")
    steps = int(plan.steps_per_epoch) + 1
    alone = stream(tmp_path / "broken", steps)
    assert_same(stream(tmp_path / "broken", steps, world_size=3, threads=4), alone)
    assert not {key for batch in alone for key in batch.keys} & set(keys)
    for batch in alone:  # as many samples as planned, and no larger
        planned = plan.micro_batch(batch.step, batch.number)
        assert len(batch.keys) == len(planned)
        assert batch.waveforms.shape[1] <= max(reference.limit for reference in planned)
    with build_loader(dataset, plan, COLLATION, steps=steps) as loader:
        for _ in loader:
            pass
        assert sorted(loader.bad) == sorted(keys)
        assert all("not decodable" in reason for reason in loader.bad.values())


def test_too_many_broken_samples_stop_the_run(speech_dataset: Path, tmp_path: Path) -> None:
    break_sample(speech_dataset, tmp_path / "broken", list(range(0, 60, 5)))
    dataset, plan = parts(tmp_path / "broken")
    with (
        build_loader(dataset, plan, COLLATION, steps=60, max_bad=4) as loader,
        pytest.raises(TooManyBadSamples, match=r"data.max_bad=4 are accepted .*tessera verify"),
    ):
        list(loader)


def test_a_data_set_of_broken_samples_ends_too(speech_dataset: Path, tmp_path: Path) -> None:
    break_sample(speech_dataset, tmp_path / "broken", list(range(191)))
    dataset, plan = parts(tmp_path / "broken")
    with (
        build_loader(dataset, plan, COLLATION, max_bad=10_000) as loader,
        pytest.raises(TooManyBadSamples, match="no sample of"),
    ):
        next(loader)


def test_waiting_is_counted_and_the_end_comes(speech_dataset: Path) -> None:
    dataset, plan = parts(speech_dataset)
    loader = build_loader(dataset, plan, COLLATION, steps=2)
    assert [[batch.number for batch in item] for item in loader] == [list(range(6))] * 2
    assert loader.wait_seconds > 0
    with pytest.raises(StopIteration):
        next(loader)


def test_a_read_that_hangs_is_told_with_its_samples_and_a_failing_disk_stops_the_run(
    speech_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe in a shard's place: to open it takes as long as nobody writes, and then it can't be read as a file."""
    shutil.copytree(speech_dataset, tmp_path / "set")
    monkeypatch.setattr("pipeline.data.loader.WAIT_LINE_EVERY", 0.05)
    dataset, plan = parts(tmp_path / "set")
    victim = plan.micro_batch(0, 0)[0].index
    shard = int(np.searchsorted(dataset.shard_starts, victim, side="right")) - 1
    tar = tmp_path / "set" / dataset.manifest.splits["train"].shards[shard].file
    tar.unlink()
    os.mkfifo(tar)

    def write_when_told() -> None:
        while len(caplog.messages) < 3:
            time.sleep(0.01)
        tar.open("wb").close()

    writer = threading.Thread(target=write_when_told)
    with build_loader(dataset, plan, COLLATION, threads=1) as loader:
        writer.start()
        with pytest.raises(OSError, match="Illegal seek") as failure:
            next(loader)
        writer.join()
    assert any("while reading sample" in note for note in failure.value.__notes__)
    assert not loader.bad
    assert "waiting for data since 0 s: step 0, micro-batch 0 (samples " in caplog.text
    assert dataset.keys(victim) in caplog.text


@pytest.mark.parametrize(("threads", "prefetch", "steps"), [(1, 1, 1), (2, 3, 3), (16, 1, 3)])
def test_memory_is_bounded_by_what_is_decoded_ahead(
    speech_dataset: Path, threads: int, prefetch: int, steps: int
) -> None:
    """Steps decoded ahead: as many as asked for, but a micro-batch a thread at least."""
    dataset, plan = parts(speech_dataset)
    seen: list[int] = []

    class Recorded(SpeechCollation):
        def __call__(self, *args: object, **options: object) -> SpeechBatch:
            batch = super().__call__(*args, **options)  # type: ignore[arg-type]
            seen.append(batch.step)
            return batch

    collation = Recorded(DATA, MaskingConfig(negatives=10), LAYERS, seed=1)
    with build_loader(dataset, plan, collation, threads=threads, prefetch=prefetch) as loader:
        next(loader)
        loader._pool.shutdown(wait=True)
        assert sorted(seen) == [step for step in range(steps + 1) for _ in range(BATCH.micro_batches)]


def test_ranks_that_do_not_divide_the_batch_are_refused(speech_dataset: Path) -> None:
    dataset, plan = parts(speech_dataset)
    with pytest.raises(ValueError, match="micro_batches=6 can't be shared by 4 ranks"):
        build_loader(dataset, plan, COLLATION, world_size=4)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_clip_once_whole_and_in_order(speech_dataset: Path, world_size: int) -> None:
    dataset = ShardedDataset(speech_dataset)
    batches = [
        list(epoch_batches(dataset, COLLATION, BATCH, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    in_order = [batches[number % world_size][number // world_size] for number in range(sum(map(len, batches)))]
    assert [batch.number for batch in in_order] == list(range(len(in_order)))
    assert [key for batch in in_order for key in batch.keys] == [dataset.keys(index) for index in range(len(dataset))]
    lengths = torch.cat([batch.lengths for batch in in_order]).tolist()
    assert lengths == [dataset.length(index) for index in range(len(dataset))]
    assert all(len(batch.keys) == 1 or batch.waveforms.numel() <= 12 * 16_000 for batch in in_order)


def test_evaluation_sees_every_image_once(image_dataset: Path) -> None:
    dataset = ShardedDataset(image_dataset)
    collation = ImageCollation(DataConfig(image_size=32), seed=0, augment=False)
    batches = list(epoch_batches(dataset, collation, BatchConfig(samples=32)))
    assert [len(batch.keys) for batch in batches] == [32] * 7 + [27]
    assert [key for batch in batches for key in batch.keys] == [dataset.keys(index) for index in range(251)]


def test_evaluation_does_not_pass_over_a_broken_sample(speech_dataset: Path, tmp_path: Path) -> None:
    (key,) = break_sample(speech_dataset, tmp_path / "broken", [9])
    with pytest.raises(SampleError, match=key):
        list(epoch_batches(ShardedDataset(tmp_path / "broken"), COLLATION, BATCH))
