"""The sampling plan: the same global batches for any world sizes and restarts, every sample exactly once an epoch, few
shards at a time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import BatchConfig, DataConfig, SampleReference, SamplingPlan
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.index import ShardError
from tests.pipeline_data.shards import PlannedMixture, PlannedShards, images, speech

LONG_ENOUGH = 0.6
clips = st.lists(st.floats(0.2, 20.0), min_size=0, max_size=25)
shards_of_clips = st.lists(clips, min_size=1, max_size=12).filter(
    lambda shards: any(seconds >= LONG_ENOUGH for shard in shards for seconds in shard)
)
shards_of_images = st.lists(st.integers(1, 30), min_size=1, max_size=12)
window = st.integers(1, 5)
MICRO_BATCHES = 12
WORLDS = [1, 2, 3, 4, 6, 12]


def speech_data(window_shards: int = 3, **others: object) -> DataConfig:
    return DataConfig(min_seconds=0.5, max_seconds=8.0, window_shards=window_shards, **others)


def speech_plan(shards: list[list[float]], seed: int = 0, window_shards: int = 3, **others: object) -> SamplingPlan:
    batch = BatchConfig(micro_batches=MICRO_BATCHES, seconds=20)
    return SamplingPlan(speech(shards), batch, speech_data(window_shards, **others), seed)


def image_plan(shards: list[int], samples: int, window_shards: int = 3, seed: int = 0) -> SamplingPlan:
    batch = BatchConfig(micro_batches=MICRO_BATCHES, samples=samples)
    return SamplingPlan(images(shards), batch, DataConfig(window_shards=window_shards), seed)


def numbered(plan: SamplingPlan, number: int) -> list[SampleReference]:
    return plan.micro_batch(*divmod(number, plan.batch.micro_batches))


def epochs(plan: SamplingPlan, count: int) -> list[list[list[SampleReference]]]:
    """The micro-batches of the first epochs of a speech plan, one list an epoch."""
    found: list[list[list[SampleReference]]] = [[]]
    number = 0
    while len(found) <= count:
        references = numbered(plan, number)
        if references[0].epoch == len(found):
            found.append([])
        assert {reference.epoch for reference in references} == {len(found) - 1}
        found[-1].append(references)
        number += 1
    return found[:count]


@settings(max_examples=60, deadline=None)
@given(shards=shards_of_clips, seed=st.integers(0, 2**32), window_shards=window)
def test_every_clip_is_taken_exactly_once_in_each_epoch(
    shards: list[list[float]], seed: int, window_shards: int
) -> None:
    plan = speech_plan(shards, seed, window_shards)
    lengths = np.concatenate(speech(shards).lengths)
    long_enough = np.flatnonzero(lengths >= plan.data.min_samples).tolist()
    assert plan.skipped == len(lengths) - len(long_enough)
    assert plan.samples == len(long_enough)
    for micro_batches in epochs(plan, 3):
        assert sorted(each.index for references in micro_batches for each in references) == long_enough


@settings(max_examples=60, deadline=None)
@given(shards=shards_of_clips, seed=st.integers(0, 2**32), window_shards=window)
def test_padded_seconds_stay_below_the_cap(shards: list[list[float]], seed: int, window_shards: int) -> None:
    plan = speech_plan(shards, seed, window_shards)
    lengths = np.concatenate(speech(shards).lengths)
    for micro_batches in epochs(plan, 2):
        padded = real = 0
        for references in micro_batches:
            crops = [min(int(lengths[each.index]), plan.data.max_samples) for each in references]
            assert [each.limit for each in references] == crops
            assert len(crops) * max(crops) <= 20 * SAMPLE_RATE
            padded += len(crops) * max(crops)
            real += sum(crops)
        if plan.streams[0].windows.bounds.tolist() == [0, len(shards)]:  # the first epoch stands for all
            assert 1 - real / padded <= plan.padding_share + 1e-9


@settings(max_examples=60, deadline=None)
@given(sizes=shards_of_images, samples=st.integers(1, 40), window_shards=window, count=st.integers(1, 4))
def test_image_micro_batches_have_one_size_and_epochs_follow_without_a_gap(
    sizes: list[int], samples: int, window_shards: int, count: int
) -> None:
    plan = image_plan(sizes, samples, window_shards)
    total = sum(sizes)
    stream: list[SampleReference] = []
    number = 0
    while len(stream) < total * count:
        references = numbered(plan, number)
        assert len(references) == samples
        stream += references
        number += 1
    for epoch in range(count):
        part = stream[epoch * total : (epoch + 1) * total]
        assert sorted(each.index for each in part) == list(range(total))
        assert {each.epoch for each in part} == {epoch}


@settings(max_examples=25, deadline=None)
@given(
    shards=shards_of_clips,
    others=shards_of_clips,
    mixed=st.booleans(),
    window_shards=window,
    spans=st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(0, 7)), min_size=1, max_size=8),
)
def test_any_history_of_world_sizes_and_kills_gives_the_same_global_batches(
    shards: list[list[float]],
    others: list[list[float]],
    mixed: bool,
    window_shards: int,
    spans: list[tuple[int, int]],
) -> None:
    """Each span is a start with another number of ranks, killed at a step whose micro-batches some ranks had read."""
    data = PlannedMixture([speech(shards), speech(others)], [2.0, 1.0]) if mixed else speech(shards)
    batch = BatchConfig(micro_batches=MICRO_BATCHES, seconds=20)
    uninterrupted = SamplingPlan(data, batch, speech_data(window_shards), 0)
    step = 0
    for world, span in spans:
        ranks = [SamplingPlan(data, batch, speech_data(window_shards), 0) for _ in range(world)]  # remember nothing
        for ahead in range(span):
            of_ranks = {
                number: plan.micro_batch(step, number)
                for rank, plan in reversed(list(enumerate(ranks)))
                for number in range(rank, MICRO_BATCHES, world)
            }
            expected = [uninterrupted.micro_batch(step, b) for b in range(MICRO_BATCHES)]
            assert [of_ranks[b] for b in range(MICRO_BATCHES)] == expected
            ranks[0].micro_batch(step + 1 + ahead, 0)  # what a loader reads ahead, and a kill loses
            step += 1


@settings(max_examples=60, deadline=None)
@given(shards=shards_of_clips, window_shards=window, seed=st.integers(0, 100))
def test_speech_stays_within_a_window_and_its_neighbour(
    shards: list[list[float]], window_shards: int, seed: int
) -> None:
    plan = speech_plan(shards, seed, window_shards)
    data = speech(shards)
    micro_batches = [numbered(plan, number) for number in range(60)]
    touched = [{data.shard_of(each.index) for each in references} for references in micro_batches]
    assert all(len(each) <= window_shards for each in touched)
    # From one micro-batch to the last of the next window: two windows' shards.
    holding = plan.streams[0].windows.holding
    windows = [(each[0].epoch, holding(each[0].epoch, data.shard_of(each[0].index))) for each in micro_batches]
    assert windows == sorted(windows)
    for one, next_one in pairwise(sorted(set(windows))):
        near = [shards for shards, each in zip(touched, windows, strict=True) if each in (one, next_one)]
        assert len(set().union(*near)) <= 2 * window_shards


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(8, 30), min_size=1, max_size=12), window_shards=window)
def test_images_stay_within_two_windows(sizes: list[int], window_shards: int) -> None:
    plan = image_plan(sizes, 8, window_shards)  # no window is smaller than a micro-batch
    data = images(sizes)
    for number in range(60):
        assert len({data.shard_of(each.index) for each in numbered(plan, number)}) <= 2 * window_shards


def test_windows_cover_the_shards_about_equally_and_change_with_the_epoch() -> None:
    plan = speech_plan([[1.0] * 4] * 17, window_shards=16)
    windows = plan.streams[0].windows
    assert np.diff(windows.bounds).tolist() == [8, 9]  # not 16 and 1
    members = [set(windows.shards(epoch, 0).tolist()) for epoch in range(5)]
    assert len(set(map(frozenset, members))) == 5
    assert sorted(windows.order(3).tolist()) == list(range(17))


def test_full_shuffle_is_one_window_of_everything() -> None:
    plan = speech_plan([[1.0] * 4] * 40, window_shards=2, shuffle="full")
    assert len(plan.streams[0].windows) == 1
    data = speech([[1.0] * 4] * 40)
    touched = {data.shard_of(each.index) for number in range(3) for each in numbered(plan, number)}
    assert len(touched) > 10


def test_epochs_and_seeds_differ_and_micro_batches_mix() -> None:
    drawn = np.random.default_rng(0).uniform(1, 6, (10, 40)).tolist()

    def sets(plan: SamplingPlan, epoch: int) -> set[frozenset[int]]:
        return {frozenset(each.index for each in references) for references in epochs(plan, epoch + 1)[epoch]}

    first = sets(speech_plan(drawn), 0)
    assert len(first & sets(speech_plan(drawn), 1)) < len(first) / 10
    assert len(first & sets(speech_plan(drawn, seed=1), 0)) < len(first) / 10


def test_padding_is_low() -> None:
    """Clips like those of LibriSpeech: most are 12 to 16 s long. One window of 16 shards of 1,300."""
    generator = np.random.default_rng(0)
    long, short = generator.normal(14.5, 1.2, 20_800), generator.uniform(1.5, 14, 20_800)
    lengths = np.clip(np.where(generator.random(20_800) < 0.6, long, short), 1.4, 24)
    data = PlannedShards([(each * SAMPLE_RATE).astype(np.int64) for each in np.split(lengths, 16)])
    plan = SamplingPlan(data, BatchConfig(micro_batches=8, seconds=87.5), DataConfig(), 0)
    padded = real = 0
    for references in epochs(plan, 1)[0]:
        limits = [each.limit for each in references]
        padded += len(limits) * max(limits)
        real += sum(limits)
    assert 1 - real / padded <= plan.padding_share < 0.035


def test_late_epochs_are_found_without_the_earlier_ones_samples() -> None:
    """A late step reads no index but those of its own window."""
    read: list[int] = []

    class Counting(PlannedShards):
        def shard_lengths(self, shard: int) -> np.ndarray:
            read.append(shard)
            return super().shard_lengths(shard)

    drawn = np.random.default_rng(0).uniform(1, 15, (200, 50))
    data = Counting([(each * SAMPLE_RATE).astype(np.int64) for each in drawn])
    plan = SamplingPlan(data, BatchConfig(micro_batches=32, seconds=60), DataConfig(), 0)
    references = plan.micro_batch(3000, 5)
    assert references[0].epoch > 30
    assert len(read) <= 16
    windows, epoch = plan.streams[0].windows, references[0].epoch
    shards = windows.shards(epoch, windows.holding(epoch, read[0]))
    assert sorted(read) == sorted(shards.tolist())


def test_epochs_are_counted_over_all_samples() -> None:
    plan = speech_plan(np.random.default_rng(0).uniform(1, 6, (10, 40)).tolist())
    sizes = [len(micro_batches) for micro_batches in epochs(plan, 3)]
    assert plan.micro_batches_per_epoch == sizes[0]
    assert plan.steps_per_epoch == sizes[0] / MICRO_BATCHES
    assert plan.epoch(0) == 0
    step, place = divmod(sum(sizes[:2]), MICRO_BATCHES)
    assert plan.epoch(step) == pytest.approx(2 - place / sizes[1])
    assert plan.epoch(step + 1) == pytest.approx(2 + (MICRO_BATCHES - place) / sizes[2])
    assert image_plan([10, 20], 5).epoch(2) == 2 * MICRO_BATCHES * 5 / 30


def mixture(weights: tuple[float, float] = (3.0, 1.0)) -> SamplingPlan:
    generator = np.random.default_rng(0)
    sources = [speech(generator.uniform(1, 6, (6, 20)).tolist()), speech(generator.uniform(1, 6, (4, 15)).tolist())]
    batch = BatchConfig(micro_batches=4, seconds=20)
    return SamplingPlan(PlannedMixture(sources, list(weights)), batch, speech_data(2), 0)


def test_a_mixture_takes_each_data_set_by_its_own_epochs() -> None:
    plan = mixture()
    seen: dict[int, list[SampleReference]] = {0: [], 1: []}
    for number in range(2000):
        references = numbered(plan, number)
        assert len({each.source for each in references}) == 1
        seen[references[0].source] += references
    for source, stream in enumerate(plan.streams):
        for epoch in range(3):
            part = seen[source][epoch * stream.samples : (epoch + 1) * stream.samples]
            assert sorted(each.index for each in part) == list(range(stream.samples))
            assert {each.epoch for each in part} == {epoch}
    micro_batches = [numbered(plan, number)[0].source for number in range(1000)]
    assert Counter(micro_batches) == {0: 750, 1: 250}


def test_data_sets_of_a_mixture_are_shuffled_apart() -> None:
    twins = [speech([[2.0] * 30] * 4), speech([[2.0] * 30] * 4)]
    plan = SamplingPlan(PlannedMixture(twins, [1, 1]), BatchConfig(micro_batches=2, seconds=20), speech_data(2), 0)
    one, other = plan.micro_batch(0, 0), plan.micro_batch(0, 1)
    assert (one[0].source, other[0].source) == (0, 1)
    assert [each.index for each in one] != [each.index for each in other]


def test_progress_of_a_mixture() -> None:
    plan = mixture()
    assert plan.samples == 6 * 20 + 4 * 15
    step = 40
    reached = [0, 0]
    for number in range(step * 4):
        reached[numbered(plan, number)[0].source] += 1
    expected = [stream.epoch(number) for stream, number in zip(plan.streams, reached, strict=True)]
    assert plan.epochs(step) == expected
    assert plan.epoch(step) == pytest.approx((120 * expected[0] + 60 * expected[1]) / 180)
    assert plan.epoch(round(plan.steps_per_epoch)) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["speech", "image", "mixture"])
def test_replacement_walks_the_window_and_keeps_the_length(kind: str) -> None:
    drawn = np.random.default_rng(0).uniform(1, 6, (8, 10)).tolist()
    plans = {
        "speech": speech_plan(drawn, window_shards=4),
        "image": image_plan([10] * 8, 7, window_shards=4),
        "mixture": mixture(),
    }
    plan = plans[kind]
    failed = plan.micro_batch(3, 1)[0]
    stream = plan.streams[failed.source]
    stand_ins: list[SampleReference] = []
    while (stand_in := plan.replacement(failed, len(stand_ins) + 1)) is not None:
        stand_ins.append(stand_in)
    shard = stream._shards.shard_of(failed.index)
    shards = stream.windows.shards(failed.epoch, stream.windows.holding(failed.epoch, shard))
    window = set(stream._samples_of(shards).tolist())
    assert Counter(each.index for each in stand_ins) == Counter(window - {failed.index})
    assert all((each.epoch, each.source) == (failed.epoch, failed.source) for each in stand_ins)
    assert all(each.limit <= failed.limit for each in stand_ins)


def test_replacement_does_not_depend_on_what_was_read_before() -> None:
    drawn = np.random.default_rng(0).uniform(1, 6, (8, 10)).tolist()
    one, other = speech_plan(drawn), speech_plan(drawn)
    failed = one.micro_batch(7, 2)[0]
    assert [one.replacement(failed, attempt) for attempt in (1, 2, 9)] == [
        other.replacement(failed, attempt) for attempt in (1, 2, 9)
    ]


def test_the_fingerprint_covers_what_decides_the_plan_and_the_description_tells_it_apart() -> None:
    drawn = np.random.default_rng(0).uniform(1, 6, (4, 10)).tolist()
    plan = speech_plan(drawn)
    assert speech_plan(drawn).fingerprint == plan.fingerprint
    assert speech_plan(drawn).changes_since(plan.description) == []

    def changes(other: SamplingPlan) -> list[str]:
        assert other.fingerprint != plan.fingerprint
        return [line for line in other.changes_since(plan.description) if ".content" not in line]

    assert changes(speech_plan(drawn, seed=1)) == ["seed 0 → 1"]
    assert changes(speech_plan(drawn, window_shards=2)) == ["data.window_shards 3 → 2"]
    assert changes(speech_plan(drawn, shuffle="full")) == ["data.shuffle window → full"]
    assert changes(speech_plan(drawn, bucket_seconds=1.0)) == ["data.bucket_seconds 0.5 → 1.0"]
    assert changes(speech_plan([*drawn[:3], drawn[3][:8]])) == ["data.samples 40 → 38"]
    assert changes(speech_plan(drawn[:3])) == ["data.samples 40 → 30", "data.shards 4 → 3"]
    batch = BatchConfig(micro_batches=6, seconds=30)
    assert changes(SamplingPlan(speech(drawn), batch, plan.data, 0)) == [
        "batch.micro_batches 12 → 6",
        "batch.seconds 20.0 → 30.0",
    ]
    assert changes(SamplingPlan(replace(speech(drawn), split="test"), plan.batch, plan.data, 0)) == [
        "data.split train → test"
    ]
    mixed = mixture()
    assert "data.mix.0.weight 3.0 → 2.0" in mixture((2.0, 1.0)).changes_since(mixed.description)
    swapped = speech([drawn[1], drawn[0], *drawn[2:]])
    (content,) = SamplingPlan(swapped, plan.batch, plan.data, 0).changes_since(plan.description)
    assert content.startswith("data.content ")


def test_indexes_that_disagree_with_the_histogram_are_refused() -> None:
    data = speech([[1.0, 2.0], [3.0, 4.0]])
    plan = SamplingPlan(data, BatchConfig(micro_batches=2, seconds=20), speech_data(), 0)
    data.lengths[1] = data.lengths[1] + SAMPLE_RATE
    with pytest.raises(ShardError, match=r"shards 0, 1 of split 'train' hold.*other lengths than lengths.npy counts"):
        plan.micro_batch(0, 0)


def test_refusals_name_the_value_and_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"batch.seconds=5.0 is less than the longest clip of 8.00 s"):
        SamplingPlan(speech([[20.0]]), BatchConfig(seconds=5), speech_data(), 0)
    with pytest.raises(ValueError, match=r"all 2 clips are shorter than data.min_seconds=0.5"):
        speech_plan([[0.2], [0.3]])
    with pytest.raises(ValueError, match=r"batch\.samples is missing"):
        SamplingPlan(images([3]), BatchConfig(seconds=5), DataConfig(), 0)
    with pytest.raises(ValueError, match=r"micro-batch 12 is not in a step of 12: use 0 to 11"):
        speech_plan([[1.0]]).micro_batch(0, 12)
    with pytest.raises(ValueError, match=r"min_seconds=0.25 is not a multiple of 0.1 s.*use 0.2"):
        DataConfig(min_seconds=0.25)
    with pytest.raises(ValueError, match=r"bucket_seconds=0.01 is not a multiple of 0.1 s.*use 0.1"):
        DataConfig(bucket_seconds=0.01)
