"""How evenly a codebook is used, from counts summed over everything that was seen.

In: counts ``(groups, codes)``. Out: numbers. The perplexity of summed counts is not the mean of batches' perplexities:
a batch can't show more codes than it has tokens.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.codebooks.health import measure_usage


class CodeCounts:
    """Counts of each group's codes over a whole set."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def add(self, usage: Tensor) -> None:
        """Add the counts ``(groups, codes)`` of a batch."""
        # fp32 stops counting at 2²⁴.
        usage = usage.detach().double().cpu()
        self._counts = usage if self._counts is None else self._counts + usage

    @property
    def counts(self) -> Tensor:
        """``(groups, codes)`` float64; raises ValueError when nothing was added."""
        if self._counts is None:
            raise ValueError("no counts were added: codebook metrics need at least one batch")
        return self._counts

    def compute(self) -> dict[str, float]:
        """Usage and perplexity (means over groups), and the dead codes of all groups."""
        health = measure_usage("quantizer", self.counts)
        groups = len(health.usages)
        return {
            "codebook_usage": sum(health.usages) / groups,
            "codebook_perplexity": sum(health.perplexities) / groups,
            "dead_codes": sum(health.unused),
        }
