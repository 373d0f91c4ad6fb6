"""Mixing: shares come true, turns are spread evenly, and a data set's own number is a closed function of the turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.data import DataConfig, Mixture, ShardedDataset, open_data
from pipeline.data.config import MIX_TURNS
from pipeline.data.mixing import Turns, deal_shares, deal_turns

weights = st.lists(st.floats(1.0, 100.0), min_size=1, max_size=8)


@settings(max_examples=30, deadline=None)
@given(weights=weights)
def test_a_round_gives_each_its_share_and_spreads_the_turns(weights: list[float]) -> None:
    shares = deal_shares(weights)
    exact = np.array(weights) / sum(weights) * MIX_TURNS
    assert shares.sum() == MIX_TURNS
    assert (abs(shares - exact) < 1).all()
    pattern = deal_turns(shares)
    assert np.bincount(pattern, minlength=len(weights)).tolist() == shares.tolist()
    dealt = np.cumsum(pattern == np.arange(len(weights))[:, None], axis=1)
    expected = shares[:, None] * np.arange(1, MIX_TURNS + 1) / MIX_TURNS
    assert (dealt - expected < 1).all()


@settings(max_examples=30, deadline=None)
@given(weights=weights, start=st.integers(0, 10**7))
def test_a_data_sets_own_numbers_follow_without_a_gap(weights: list[float], start: int) -> None:
    turns = Turns(weights)
    reached = turns.reached(start)
    assert sum(reached) == start
    for number in range(start, start + 50):
        source, own = turns.place(number)
        assert own == reached[source]
        reached[source] += 1
        assert turns.reached(number + 1) == reached


def test_one_data_set_is_the_mixture_of_one() -> None:
    turns = Turns([0.3])
    assert [turns.place(number) for number in (0, 1, 999, 1000, 10**9)] == [(0, n) for n in (0, 1, 999, 1000, 10**9)]


def test_weights_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"weight 1e-05 is less than one micro-batch in 1000 of all weights' 1.00001"):
        deal_shares([1, 1e-5])
    a, b = {"path": "a"}, {"path": "b", "weight": 0.0005}
    with pytest.raises(ValidationError, match=r"mix.1.weight=0.0005 is less than one micro-batch in 1000.*leave b out"):
        DataConfig(mix=(a, b))
    with pytest.raises(ValidationError, match=r"mix.0.weight\n.*greater than 0"):
        DataConfig(mix=({"path": "a", "weight": 0},))
    with pytest.raises(ValidationError, match=r"path=c and mix can't both name the data: keep one of them"):
        DataConfig(path="c", mix=(a,))
    with pytest.raises(ValidationError, match=r"split=test means nothing with mix"):
        DataConfig(split="test", mix=(a,))


def test_data_sets_are_read_side_by_side(speech_dataset: Path, image_dataset: Path) -> None:
    data = DataConfig(mix=({"path": speech_dataset}, {"path": speech_dataset, "split": "validation", "weight": 0.2}))
    both = open_data(data)
    assert isinstance(both, Mixture)
    assert [len(source) for source in both.sources] == [191, 17]
    assert (len(both), both.kind, both.weights) == (208, "speech", (1.0, 0.2))
    one, other = (source.read(3).key for source in both.sources)
    assert one == ShardedDataset(speech_dataset).keys(3) != other
    both.close()
    alone = open_data(DataConfig(path=speech_dataset, split="validation"))
    assert isinstance(alone, ShardedDataset)
    assert alone.split == "validation"
    with pytest.raises(ValueError, match=r"speech holds speech data and .*images image data: a mixture is of one kind"):
        open_data(DataConfig(mix=({"path": speech_dataset}, {"path": image_dataset})))
