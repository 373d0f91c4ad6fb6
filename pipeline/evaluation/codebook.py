"""How evenly a codebook is used, from counts summed over everything that was seen.

In: counts ``(groups, codes)``. Out: numbers. The perplexity of summed counts is not the mean of batches'
perplexities: a batch can't show more codes than it has tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        return {
            "codebook_usage": float(usage_fraction(self.counts).mean()),
            "codebook_perplexity": float(perplexity(self.counts).mean()),
            "dead_codes": int((self.counts == 0).sum()),
        }


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy in nats, per group: ``(groups, codes)`` → float64 ``(groups,)``, 1 … codes; 0 without
    tokens.
    """
    counts = counts.double()
    total = counts.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(counts / total.clamp(min=1), counts / total.clamp(min=1)).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), torch.zeros_like(entropy))


def usage_fraction(counts: Tensor) -> Tensor:
    """Share of codes that occur, per group: ``(groups, codes)`` → float64 ``(groups,)``."""
    return (counts > 0).double().mean(-1)
