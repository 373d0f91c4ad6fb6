"""Usage and perplexity, over summed counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.evaluation.codebook import CodeCounts


def measure(*batches: Tensor) -> dict[str, float]:
    counts = CodeCounts()
    for usage in batches:
        counts.add(usage)
    return counts.compute()


@pytest.mark.parametrize(
    ("counts", "perplexity", "usage"),
    [
        ([5.0, 5.0, 5.0, 5.0], 4.0, 1.0),
        ([9.0, 0.0, 0.0, 0.0], 1.0, 0.25),
        ([2.0, 1.0, 1.0, 0.0], math.exp(1.5 * math.log(2)), 0.75),  # the entropy of (1/2, 1/4, 1/4) is 1.5 log 2
    ],
)
def test_known_distributions(counts: list[float], perplexity: float, usage: float) -> None:
    metrics = measure(torch.tensor([counts]))
    assert metrics["codebook_perplexity"] == pytest.approx(perplexity)
    assert metrics["codebook_usage"] == pytest.approx(usage)


def test_counts_are_summed_before_anything_is_computed() -> None:
    """Two batches that each show one code make two codes, not a mean of one."""
    first, second = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    together = measure(first, second)
    assert together == pytest.approx({"codebook_usage": 1.0, "codebook_perplexity": 2.0, "dead_codes": 0})
    mean_of_batches = (measure(first)["codebook_perplexity"] + measure(second)["codebook_perplexity"]) / 2
    assert mean_of_batches == pytest.approx(1.0)


def test_counts_beyond_fp32_are_exact() -> None:
    counts = CodeCounts()
    counts.add(torch.tensor([[2.0**24]]))
    for _ in range(3):
        counts.add(torch.tensor([[1.0]]))
    assert counts.counts.item() == 2**24 + 3


def test_groups_are_averaged_and_dead_codes_summed() -> None:
    counts = CodeCounts()
    counts.add(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert counts.compute() == pytest.approx({"codebook_usage": 0.75, "codebook_perplexity": 3.0, "dead_codes": 2})


def test_nothing_counted_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        CodeCounts().compute()
