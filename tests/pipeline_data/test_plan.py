"""The sampling plan: the same global batches for any world sizes and restarts, every sample exactly once an epoch."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import BatchConfig, DataConfig, SampleReference, SamplingPlan
from pipeline.data.config import SAMPLE_RATE


@dataclass
class Lengths:
    """A data set as the plan sees it."""

    lengths: np.ndarray
    kind: str = "speech"
    fingerprint: str = field(default="0123456789abcdef")


clip_seconds = st.lists(st.floats(0.2, 20.0), min_size=1, max_size=120)
speech_data = DataConfig(min_seconds=0.5, max_seconds=8.0)


def speech(seconds: list[float]) -> Lengths:
    return Lengths((np.array(seconds) * SAMPLE_RATE).astype(np.int64))


def speech_plan(seconds: list[float], seed: int = 0, micro_batches: int = 12) -> SamplingPlan:
    return SamplingPlan(speech(seconds), BatchConfig(micro_batches=micro_batches, seconds=20), speech_data, seed)


def images(count: int, samples: int, micro_batches: int = 6, seed: int = 0) -> SamplingPlan:
    dataset = Lengths(np.full(count, 64 * 64), "image")
    return SamplingPlan(dataset, BatchConfig(micro_batches=micro_batches, samples=samples), DataConfig(), seed)


def numbered(plan: SamplingPlan, number: int) -> list[SampleReference]:
    return plan.micro_batch(*divmod(number, plan.batch.micro_batches))


@settings(max_examples=60, deadline=None)
@given(seconds=clip_seconds.filter(lambda each: max(each) >= 0.6), seed=st.integers(0, 2**32))
def test_every_clip_is_taken_exactly_once_in_each_epoch(seconds: list[float], seed: int) -> None:
    plan = speech_plan(seconds, seed)
    per_epoch = int(plan.micro_batches_per_epoch)
    long_enough = np.flatnonzero(speech(seconds).lengths >= speech_data.min_samples).tolist()
    assert plan.skipped == len(seconds) - len(long_enough)
    for epoch in range(3):
        references = [
            reference
            for number in range(epoch * per_epoch, (epoch + 1) * per_epoch)
            for reference in numbered(plan, number)
        ]
        assert sorted(reference.index for reference in references) == long_enough
        assert {reference.epoch for reference in references} == {epoch}


@settings(max_examples=60, deadline=None)
@given(seconds=clip_seconds.filter(lambda each: max(each) >= 0.6), seed=st.integers(0, 2**32))
def test_padded_seconds_stay_below_the_cap(seconds: list[float], seed: int) -> None:
    plan = speech_plan(seconds, seed)
    lengths = speech(seconds).lengths
    for number in range(2 * int(plan.micro_batches_per_epoch)):
        references = numbered(plan, number)
        crops = [min(int(lengths[reference.index]), speech_data.max_samples) for reference in references]
        assert [reference.limit for reference in references] == crops
        assert len(crops) * max(crops) <= 20 * SAMPLE_RATE


@settings(max_examples=40, deadline=None)
@given(
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=8),
    spans=st.lists(st.integers(1, 5), min_size=8, max_size=8),
    seconds=st.lists(st.floats(0.5, 20.0), min_size=5, max_size=60),
)
def test_any_history_of_world_sizes_gives_the_same_global_batches(
    worlds: list[int], spans: list[int], seconds: list[float]
) -> None:
    uninterrupted = speech_plan(seconds)
    step = 0
    for world, span in zip(worlds, spans, strict=False):
        plan = speech_plan(seconds)  # a restart remembers nothing but the step
        for _ in range(span):
            of_ranks = {
                number: plan.micro_batch(step, number)
                for rank in reversed(range(world))
                for number in range(rank, 12, world)
            }
            assert [of_ranks[b] for b in range(12)] == [uninterrupted.micro_batch(step, b) for b in range(12)]
            step += 1


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 50), samples=st.integers(1, 17), epochs=st.integers(1, 4))
def test_image_micro_batches_have_one_size_and_epochs_follow_without_a_gap(
    count: int, samples: int, epochs: int
) -> None:
    plan = images(count, samples)
    stream: list[SampleReference] = []
    number = 0
    while len(stream) < count * epochs:
        references = numbered(plan, number)
        assert len(references) == samples
        stream += references
        number += 1
    for epoch in range(epochs):
        part = stream[epoch * count : (epoch + 1) * count]
        assert sorted(reference.index for reference in part) == list(range(count))
        assert {reference.epoch for reference in part} == {epoch}


def test_epochs_and_seeds_differ_and_micro_batches_mix() -> None:
    seconds = np.random.default_rng(0).uniform(1, 6, 400).tolist()
    plan = speech_plan(seconds)
    per_epoch = int(plan.micro_batches_per_epoch)

    def sets(plan: SamplingPlan, epoch: int) -> set[frozenset[int]]:
        return {
            frozenset(reference.index for reference in numbered(plan, epoch * per_epoch + place))
            for place in range(per_epoch)
        }

    assert len(sets(plan, 0) & sets(plan, 1)) < per_epoch / 10
    assert len(sets(plan, 0) & sets(speech_plan(seconds, seed=1), 0)) < per_epoch / 10
    assert plan.fingerprint != speech_plan(seconds, seed=1).fingerprint


def test_padding_share_bounds_the_real_padding() -> None:
    seconds = np.random.default_rng(0).uniform(1, 6, 400).tolist()
    plan = speech_plan(seconds)
    padded = real = 0
    for number in range(int(plan.micro_batches_per_epoch)):
        limits = [reference.limit for reference in numbered(plan, number)]
        padded += len(limits) * max(limits)
        real += sum(limits)
    assert 1 - real / padded <= plan.padding_share < 0.2


def test_access_is_as_fast_a_million_steps_on() -> None:
    """Resuming costs O(1): a late step needs its own epoch's permutation and none of the earlier ones."""
    plan = SamplingPlan(
        speech(np.random.default_rng(0).uniform(1, 15, 100_000).tolist()),
        BatchConfig(micro_batches=32, seconds=60),
        DataConfig(),
        0,
    )
    plan.micro_batch(0, 0)
    began = time.perf_counter()
    plan.micro_batch(10_000_000, 5)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for b in range(32):
        plan.micro_batch(10_000_000, b)
    assert first < 1.0
    assert (time.perf_counter() - began) / 32 < 0.01


def test_replacement_walks_the_epochs_order_and_keeps_the_length() -> None:
    plan = speech_plan(np.random.default_rng(0).uniform(1, 6, 40).tolist())
    failed = plan.micro_batch(3, 1)[0]
    stand_ins = [plan.replacement(failed, attempt) for attempt in range(1, plan.samples)]
    assert Counter(each.index for each in stand_ins) == Counter(set(range(40)) - {failed.index})
    assert all(each.limit <= failed.limit and each.epoch == failed.epoch for each in stand_ins)


def test_refusals_name_the_value_and_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"batch.seconds=5.0 is less than the longest clip of 8.00 s"):
        SamplingPlan(speech([20.0]), BatchConfig(seconds=5), speech_data, 0)
    with pytest.raises(ValueError, match=r"all 2 clips are shorter than data.min_seconds=0.5"):
        speech_plan([0.2, 0.3])
    with pytest.raises(ValueError, match=r"batch\.samples is missing"):
        SamplingPlan(Lengths(np.ones(3), "image"), BatchConfig(seconds=5), DataConfig(), 0)
    with pytest.raises(ValueError, match=r"micro-batch 12 is not in a step of 12: use 0 to 11"):
        speech_plan([1.0]).micro_batch(0, 12)
