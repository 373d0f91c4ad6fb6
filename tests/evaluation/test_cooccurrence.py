"""What counts of codes by label say."""

from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.cooccurrence import by_label, given_code, in_label_order, information


def test_codes_of_their_own_tell_everything_and_shared_ones_nothing() -> None:
    own = torch.eye(4).double() * torch.tensor([[1.0], [5.0], [2.0], [900.0]]).double()
    assert information(own) == pytest.approx(2.0)  # who spoke more does not count more
    assert information(torch.ones(4, 7).double()) == pytest.approx(0.0)
    half = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).double()
    assert information(half) == pytest.approx(0.5)


def test_shares_are_those_of_labels_that_spoke_as_much() -> None:
    counts = torch.tensor([[8.0, 2.0, 0.0], [50.0, 50.0, 0.0]]).double()
    shares = given_code(counts)
    assert shares[:, 0].tolist() == pytest.approx([0.8 / 1.3, 0.5 / 1.3])
    assert shares[:, 1].tolist() == pytest.approx([0.2 / 0.7, 0.5 / 0.7])
    assert shares[:, 2].tolist() == [0.0, 0.0]
    assert in_label_order(shares).tolist() == [0, 1]  # what never occurs is not shown


def test_counts_of_clips_are_summed_by_label() -> None:
    counts = [torch.tensor([[1, 2]]), torch.tensor([[10, 0]]), torch.tensor([[3, 3]]), torch.tensor([[7, 7]])]
    names, table = by_label(counts, ["fr", "cs", "fr", ""])
    assert names == ["cs", "fr"]
    assert table.tolist() == [[[10.0, 0.0], [4.0, 5.0]]]
