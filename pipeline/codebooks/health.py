"""How well codebooks are used, from counts summed over all ranks.

In: each quantizer's counts of one optimiser step. Out: shares, perplexities, and a flat summary for the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizerHealth:
    """One quantizer over one optimiser step; values are by group where the name is in the plural."""

    name: str
    tokens: int
    """Real tokens that it quantized, on all ranks."""
    usages: list[float]
    """Share of codes that were chosen at least once."""
    perplexities: list[float]
    """exp of the entropy in nats of the chosen codes: the number of codes in even use; 0 without tokens."""
    unused: list[int]
    """Codes that no token chose."""
    replaced: int = 0
    """Codes that moved to a latent after this step, in all groups."""


@dataclass(frozen=True)
class CodebookHealth:
    """All quantizers of a model over one optimiser step."""

    quantizers: list[QuantizerHealth]

    def summary(self) -> dict[str, float]:
        """``codebook_usage`` and ``codebook_perplexity``: means over quantizers and groups; ``codebook_unused`` and
        ``codebook_replaced``: codes of all quantizers and groups. With several quantizers also each one's, as
        ``codebook_usage/<name>``. Empty for a model without codebooks."""
        if not self.quantizers:
            return {}
        usages = [usage for health in self.quantizers for usage in health.usages]
        perplexities = [perplexity for health in self.quantizers for perplexity in health.perplexities]
        values = {
            "codebook_usage": _mean(usages),
            "codebook_perplexity": _mean(perplexities),
            "codebook_unused": float(sum(sum(health.unused) for health in self.quantizers)),
            "codebook_replaced": float(sum(health.replaced for health in self.quantizers)),
        }
        if len(self.quantizers) > 1:
            for health in self.quantizers:
                values[f"codebook_usage/{health.name}"] = _mean(health.usages)
                values[f"codebook_perplexity/{health.name}"] = _mean(health.perplexities)
        return values


def measure_usage(name: str, counts: Tensor, replaced: int = 0) -> QuantizerHealth:
    """Health from ``counts (groups, codes)``, summed over ranks."""
    counts = counts.double().cpu()
    tokens = counts.sum(dim=1, keepdim=True)
    shares = counts / tokens.clamp(min=1)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=1)
    perplexities = torch.where(tokens.squeeze(1) > 0, entropy.exp(), 0.0)
    return QuantizerHealth(
        name=name,
        tokens=int(tokens[0]),
        usages=(counts > 0).double().mean(dim=1).tolist(),
        perplexities=perplexities.tolist(),
        unused=(counts == 0).sum(dim=1).tolist(),
        replaced=replaced,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
