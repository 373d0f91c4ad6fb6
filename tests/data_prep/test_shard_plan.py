"""The plan of shards: a pure function of files and settings, balanced, with splits that stay as files are added."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.shard_plan import Settings, parse_splits, plan_hash, plan_shards
from data_prep.source import SourceFile


def files_of(sizes: list[int]) -> list[SourceFile]:
    return [
        SourceFile(f"clip-{number}", f"clip-{number}.wav", "", 0, size, 0, f"speaker-{number % 7}")
        for number, size in enumerate(sizes)
    ]


def settings_of(shard_bytes: int = 10_000, split_by: str = "file", seed: int = 0, train: float = 0.8) -> Settings:
    splits = (("train", train), ("validation", 1 - train))
    return Settings("speech", shard_bytes, splits, split_by, seed, None)


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=200),
    shard_bytes=st.integers(1, 50_000),
    seed=st.integers(0, 100),
)
def test_each_file_is_in_one_shard_and_shards_are_balanced(sizes: list[int], shard_bytes: int, seed: int) -> None:
    files = files_of(sizes)
    tasks = plan_shards(files, settings_of(shard_bytes, seed=seed))
    assert sorted(file.key for task in tasks for file in task.files) == sorted(file.key for file in files)
    for split in ("train", "validation"):
        numbers = [task.number for task in tasks if task.split == split]
        assert numbers == list(range(len(numbers)))
    largest = max([512, *sizes])
    assert all(task.bytes <= shard_bytes + largest for task in tasks)
    assert tasks == plan_shards(list(reversed(files)), settings_of(shard_bytes, seed=seed))


def test_a_file_stays_in_its_split_when_others_come() -> None:
    def split_of(count: int) -> dict[str, str]:
        return {
            file.key: task.split for task in plan_shards(files_of([100] * count), settings_of()) for file in task.files
        }

    before, after = split_of(500), split_of(1000)
    assert {key: after[key] for key in before} == before
    assert sum(split == "train" for split in after.values()) == pytest.approx(800, abs=40)


def test_speakers_are_kept_together_on_demand() -> None:
    tasks = plan_shards(files_of([100] * 700), settings_of(split_by="label", train=0.5))
    speakers = {
        split: {file.label for task in tasks if task.split == split for file in task.files}
        for split in ("train", "validation")
    }
    assert not speakers["train"] & speakers["validation"]
    assert len(speakers["train"] | speakers["validation"]) == 7


def test_the_hash_names_files_and_settings() -> None:
    def name(sizes: list[int], **options: int) -> str:
        chosen = settings_of(**options)
        return plan_hash(plan_shards(files_of(sizes), chosen), chosen)

    assert name([5, 6]) == name([5, 6])
    assert len({name([5, 6]), name([5, 7]), name([5, 6, 7]), name([5, 6], seed=1), name([5, 6], shard_bytes=9)}) == 5


def test_splits_are_parsed() -> None:
    assert parse_splits("train=0.9, validation=0.1") == {"train": 0.9, "validation": 0.1}
    assert parse_splits("train-clean") == {"train-clean": 1.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train=0.9", "sums to 0.9"),
        ("train=1.5,validation=-0.5", "above 0"),
        ("train=most", "share 'most'"),
        ("=1", "no usable name"),
        ("../x=1", "no usable name"),
        ("a=0.5,a=0.5", "named twice"),
    ],
)
def test_splits_that_mean_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_splits(text)
