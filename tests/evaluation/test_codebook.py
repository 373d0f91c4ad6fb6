"""Usage and perplexity, over summed counts."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.evaluation.codebook import CodeCounts, perplexity, usage_fraction


def test_perplexity_of_known_distributions() -> None:
    counts = torch.tensor([[5.0, 5.0, 5.0, 5.0], [9.0, 0.0, 0.0, 0.0], [2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # Entropy of (1/2, 1/4, 1/4) is 1.5 log 2.
    expected = torch.tensor([4.0, 1.0, math.exp(1.5 * math.log(2)), 0.0], dtype=torch.float64)
    torch.testing.assert_close(perplexity(counts), expected)


def test_usage_is_the_share_of_codes_that_occur() -> None:
    torch.testing.assert_close(
        usage_fraction(torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 7.0]])),
        torch.tensor([0.5, 0.25], dtype=torch.float64),
    )


def test_counts_are_summed_before_anything_is_computed() -> None:
    """Two batches that each show one code make two codes, not a mean of one."""
    batches = [torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])]
    counts = CodeCounts()
    for usage in batches:
        counts.add(usage)
    metrics = counts.compute()
    assert metrics["codebook_perplexity"] == pytest.approx(2.0)
    assert metrics["codebook_usage"] == 1.0
    assert metrics["dead_codes"] == 0
    mean_of_batches = sum(float(perplexity(usage)) for usage in batches) / 2
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
