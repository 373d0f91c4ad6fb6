"""Buckets and cuts: counting micro-batches from histograms agrees with cutting them, and with taking slot by slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import DataConfig
from pipeline.data.buckets import Buckets, count_micro_batches, cut_slots
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.lengths import length_histogram


def cut_one_by_one(counts: list[int], padded: list[int], cap: int) -> list[int]:
    """The plainest way: a slot begins a new micro-batch when all slots padded to its length would be over the cap."""
    lengths = [length for count, length in zip(counts, padded, strict=True) for _ in range(count)]
    cuts = [0]
    for slot, length in enumerate(lengths):
        if (slot - cuts[-1] + 1) * length > cap:
            cuts.append(slot)
    return [*cuts, len(lengths)] if lengths else cuts


@settings(max_examples=200, deadline=None)
@given(
    windows=st.lists(st.lists(st.integers(0, 30), min_size=5, max_size=5), min_size=1, max_size=6),
    widths=st.lists(st.integers(1, 40), min_size=5, max_size=5),
    cap=st.integers(200, 1000),
)
def test_three_ways_to_cut_agree(windows: list[list[int]], widths: list[int], cap: int) -> None:
    padded = np.cumsum(widths)
    capacities = cap // padded
    made, total = count_micro_batches(np.array(windows), padded, capacities)
    for counts, number, padded_samples in zip(windows, made.tolist(), total.tolist(), strict=True):
        cuts = cut_slots(np.array(counts), capacities)
        assert cuts.tolist() == cut_one_by_one(counts, padded.tolist(), cap)
        assert len(cuts) - 1 == number
        ends = np.repeat(padded, counts)[cuts[1:] - 1] if number else np.zeros(0)
        assert padded_samples == int((np.diff(cuts) * ends).sum())
        assert (np.diff(cuts) * ends <= cap).all()


@settings(max_examples=100, deadline=None)
@given(
    seconds=st.lists(st.floats(0.05, 25.0), min_size=1, max_size=60),
    least=st.integers(1, 15),
    most=st.floats(1.5, 20.0),
    bucket=st.integers(1, 12),
)
def test_buckets_bound_their_clips_and_count_them_all(
    seconds: list[float], least: int, most: float, bucket: int
) -> None:
    data = DataConfig(min_seconds=least / 10, max_seconds=most, bucket_seconds=bucket / 10)
    lengths = (np.array(seconds) * SAMPLE_RATE).astype(np.int64)
    histogram = length_histogram(lengths)
    buckets = Buckets(data, 60.0, len(histogram))
    placed = buckets.sort(lengths)
    assert ((placed >= 0) == (lengths >= data.min_samples)).all()
    kept = placed >= 0
    cropped = np.minimum(lengths[kept], data.max_samples)
    assert (cropped <= buckets.padded[placed[kept]]).all()
    assert (np.diff(buckets.padded) > 0).all()
    if len(histogram) > buckets.first_bin:
        counts = buckets.count(histogram[None, :].astype(np.uint32))[0]
        assert counts.tolist() == np.bincount(placed[kept], minlength=len(buckets.padded)).tolist()
        real = cropped.sum() / SAMPLE_RATE
        assert real - 0.1 * kept.sum() - 1e-6 <= buckets.least_seconds(histogram) <= real + 1e-6


def test_the_longest_clip_must_fit() -> None:
    with pytest.raises(ValueError, match=r"batch.seconds=5.0 is less than the longest clip of 8.00 s: use"):
        Buckets(DataConfig(max_seconds=8.0), 5.0, 300)
    Buckets(DataConfig(max_seconds=8.0), 5.0, 50)  # none is longer than 5 s
