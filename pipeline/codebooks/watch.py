"""What a quantizer adds up in steps that are logged, for the health that counts of codes can't tell.

In: the latents of each forward as they are compared with codes, and what the quantizer made of them. Out: sums of one
fixed layout, which travel with the step's statistics. Changes nothing of what it watches.

A forward's sums are those of at most :data:`WATCHED_TOKENS` of its tokens, chosen by their number alone: the
micro-batch decides which they are, so health does not depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.codebooks.collapse import SecondMoments
from pipeline.codebooks.topology import find_torn
from pipeline.quantizers.base import Quantized, Quantizer

WATCHED_TOKENS = 1024
"""Tokens of a forward that are looked at, at most."""
WATCHED_DIM = 1024
"""Features of the largest latents that are watched: the sums grow with their square."""
SEARCHED_AT_ONCE = 1 << 22
"""Distances to codes in memory when a map's two nearest codes are looked for: 16 MB."""
GAP = "soft_hard_gap"
"""The metric in which smoothed kinds say how far their mixtures are from codes."""
SCALARS = 5  # sums that are one number: see Watched


@dataclass(frozen=True)
class Watched:
    """A step's sums over all ranks, of one quantizer."""

    tokens: int
    """Tokens that were looked at."""
    squared_error: float
    """Σ|x − c|² of latents x and their codes' vectors c."""
    torn: float
    """Tokens whose two nearest codes are no neighbours on the map; a mean over groups."""
    smoothed_tokens: int
    """All tokens of forwards that told their soft/hard gap."""
    gap: float
    """Σ of the soft/hard gap over those."""
    latents: SecondMoments
    """Of latents as they are compared with codes."""


class Watch:
    """Adds up what :class:`Watched` holds, over the forwards of one step on this rank.

    Sums are fp32 and made in float64 within a forward. Second moments are about 0: where the latents' mean is more than
    a hundred times their deviation, their variance is rounding error (see :data:`pipeline.codebooks.collapse.FLAT`).
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.dim = compared_dim(quantizer)
        self.size = SCALARS + self.dim + self.dim * self.dim
        self._sums: Tensor | None = None

    @torch.no_grad()
    def __call__(self, latents: Tensor, found: Quantized) -> None:
        """Add one forward: latents ``(tokens, dim)`` fp32."""
        quantizer = self.quantizer
        chosen = spread_tokens(len(latents), latents.device)
        sample, codes = latents[chosen], found.codes[chosen]
        exact = sample.double()
        error = torn = torch.zeros((), dtype=torch.float64, device=latents.device)
        if compares(quantizer):
            # What a smoothed kind gives in training is a mixture; the others give the code's vector.
            vectors = found.vectors[chosen].detach()
            if GAP in found.metrics:
                vectors = quantizer.join_groups(quantizer.vectors_of(codes))
            error = (exact - vectors.double()).square().sum()
        if is_map(quantizer):
            codebooks, split = quantizer.codebook(), quantizer.split_groups(sample)
            chunk = max(1, SEARCHED_AT_ONCE // quantizer.codes)
            are_neighbours: Any = quantizer.are_neighbours
            of_groups = [
                find_torn(split[:, group], codebooks[group], are_neighbours, chunk) for group in range(quantizer.groups)
            ]
            torn = torch.stack(of_groups).double().mean(dim=0).sum()
        smoothed = len(latents) if GAP in found.metrics else 0
        gap = found.metrics[GAP].double() * smoothed if smoothed else torch.zeros_like(error)
        scalars = torch.stack([torn.new_tensor(len(sample)), error, torn, torn.new_tensor(smoothed), gap])
        sums = torch.cat([scalars, exact.sum(dim=0), (exact.T @ exact).reshape(-1)]).float()
        self._sums = sums if self._sums is None else self._sums + sums

    def pending(self) -> Tensor:
        """The sums since they were last cleared: fp32 ``(size,)``."""
        if self._sums is None:
            return torch.zeros(self.size, device=self.quantizer.updates.device)
        return self._sums.to(self.quantizer.updates.device)

    def clear(self) -> None:
        """Forget the sums."""
        self._sums = None

    def read(self, reduced: Tensor) -> Watched:
        """What :meth:`pending` gave, summed over ranks."""
        sums = reduced.double().cpu()
        tokens, error, torn, smoothed, gap = sums[:SCALARS].tolist()
        total, products = sums[SCALARS:].split([self.dim, self.dim * self.dim])
        moments = SecondMoments(int(tokens), total, products.reshape(self.dim, self.dim))
        return Watched(int(tokens), error, torn, int(smoothed), gap, moments)


def compared_dim(quantizer: Quantizer) -> int:
    """Size of a latent as it is compared with codes."""
    return quantizer.input_dim if quantizer.project_in is None else quantizer.codebook_dim


def can_watch(quantizer: Quantizer) -> bool:
    """Whether its sums are small enough to travel with a step's statistics, and its codes are its own: those of
    quantizers within it are watched themselves."""
    holds_others = any(isinstance(part, Quantizer) for part in quantizer.modules() if part is not quantizer)
    return not holds_others and compared_dim(quantizer) <= WATCHED_DIM


def compares(quantizer: Quantizer) -> bool:
    """Whether codes lie where latents lie, as they are compared."""
    return bool(quantizer.codes and quantizer.compares_latents)


def is_map(quantizer: Quantizer) -> bool:
    """Whether the codes lie on a grid."""
    return hasattr(quantizer, "are_neighbours") and quantizer.codes > 1


def spread_tokens(tokens: int, device: torch.device | None = None) -> Tensor:
    """Places of :data:`WATCHED_TOKENS` tokens spread over all, or all when there are fewer: int64, ascending.

    One of each of as many equal stretches. Its place within changes from stretch to stretch by the golden ratio: tokens
    come in rows of images, and equal distances would look at a few columns only.
    """
    if tokens <= WATCHED_TOKENS:
        return torch.arange(tokens, device=device)
    stretch = torch.arange(WATCHED_TOKENS, device=device)
    first, last = stretch * tokens // WATCHED_TOKENS, (stretch + 1) * tokens // WATCHED_TOKENS
    within = stretch * 40503 % 65536  # 65536 · 0.618…, odd
    return first + (within * (last - first) >> 16)
