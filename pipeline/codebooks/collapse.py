"""Signs of collapse: how many dimensions latents and codes really use, and how far codes are from what they stand for.

In: latents and codes, batch by batch. Out: numbers over the whole set, from sums. Pure of files and of randomness.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SecondMoments:
    """Count, sum and outer products of vectors, in float64: the covariance of everything that was added."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """Add ``(tokens, dim)``."""
        vectors = vectors.detach().double()
        total, products = vectors.sum(0), vectors.T @ vectors
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products + products
        self.count += vectors.shape[0]

    def covariance(self) -> Tensor:
        """``(dim, dim)``, float64. Raises ValueError when nothing was added."""
        if self._sum is None or self._products is None or not self.count:
            raise ValueError("no vectors were added: a covariance needs at least one")
        mean = self._sum / self.count
        return self._products / self.count - torch.outer(mean, mean)


def effective_dimension(covariance: Tensor, share: float = 0.99) -> int:
    """The smallest number of principal axes that hold ``share`` of the variance; 0 where there is no variance.

    covariance ``(dim, dim)``. Full rank is ``dim``; a collapsed representation needs few.
    """
    variances = torch.linalg.eigvalsh(covariance.double()).clamp(min=0).flip(0)
    total = variances.sum()
    # Rounding leaves about 1e-16 of the largest entry: that is no variance.
    if total <= 1e-12 * covariance.abs().max().clamp(min=1e-300):
        return 0
    held = variances.cumsum(0) / total
    return int((held < share - 1e-12).sum()) + 1


def codes_dimension(codebook: Tensor, used: Tensor, share: float = 0.99) -> int:
    """Effective dimension of the codes in use, each counted once.

    codebook ``(codes, dim)``, used bool ``(codes,)``.
    """
    if not used.any():
        return 0
    moments = SecondMoments()
    moments.add(codebook[used])
    return effective_dimension(moments.covariance(), share)


def token_concentration(codebook: Tensor, used: Tensor, latent_rms: float) -> float:
    """Mean distance of a used code to the nearest other used code, over the latents' root mean square norm.

    codebook ``(codes, dim)``, used bool ``(codes,)``. Near 0 the codes crowd at a few places (token collapse); NaN
    with fewer than two used codes or with latents that are all zero.
    """
    codes = codebook[used].double()
    if codes.shape[0] < 2 or not latent_rms:
        return float("nan")
    nearest = [
        torch.cdist(part, codes).scatter_(1, torch.arange(start, start + len(part))[:, None], float("inf")).amin(1)
        for start, part in zip(range(0, len(codes), 1024), codes.split(1024), strict=True)
    ]
    return float(torch.cat(nearest).mean()) / latent_rms
