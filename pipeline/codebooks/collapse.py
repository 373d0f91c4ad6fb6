"""Signs of collapse: how many dimensions latents and codes really use, and how far codes are from what they stand for.

In: latents and codes, batch by batch. Out: numbers over the whole set, from sums. Pure of files and of randomness.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLAT = 1e-4
"""Variance below this part of the mean square: all vectors point to one place, 1 % of their length around it. bf16,
which keeps 3 digits, can't tell them apart, and sums of squares in fp32 can't tell their variance."""


class SecondMoments:
    """Count, sum and outer products of vectors, in float64: the covariance of everything that was added."""

    def __init__(self, count: int = 0, total: Tensor | None = None, products: Tensor | None = None) -> None:
        self.count = count
        self._sum = total
        self._products = products

    def add(self, vectors: Tensor) -> None:
        """Add ``(tokens, dim)``."""
        vectors = vectors.detach().double()
        total, products = vectors.sum(0), vectors.T @ vectors
        self._sum = total if self._sum is None else self._sum + total
        self._products = products if self._products is None else self._products + products
        self.count += vectors.shape[0]

    def mean(self) -> Tensor:
        """``(dim,)``, float64. Raises ValueError when nothing was added."""
        if self._sum is None or not self.count:
            raise ValueError("no vectors were added: a mean needs at least one")
        return self._sum / self.count

    def covariance(self) -> Tensor:
        """``(dim, dim)``, float64. Raises ValueError when nothing was added."""
        if self._sum is None or self._products is None or not self.count:
            raise ValueError("no vectors were added: a covariance needs at least one")
        mean = self._sum / self.count
        return self._products / self.count - torch.outer(mean, mean)

    def variance(self) -> float:
        """Mean squared distance to the mean: the trace of :meth:`covariance`."""
        return max(0.0, float(self.covariance().trace()))

    def mean_square(self) -> float:
        """Mean squared length."""
        return self.variance() + float(self.mean().square().sum())


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
    return effective_dimension(fit_codes(codebook, used)[1], share) if used.any() else 0


def fit_codes(codebook: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(dim,)`` and covariance ``(dim, dim)`` of the codes in use, each counted once, float64.

    codebook ``(codes, dim)``, used bool ``(codes,)``, of which there is one. Products are fp32, of codes from which
    their mean is taken off.
    """
    codes = codebook[used].float()
    centre = codes.mean(dim=0)
    centred = codes.sub_(centre)
    rest = centred.mean(dim=0, dtype=torch.float64)  # what the fp32 mean has missed
    return centre + rest, (centred.T @ centred).double() / len(codes) - torch.outer(rest, rest)


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


def code_latent_divergence(latents: SecondMoments, codes: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How far the codes in use are from where latents are, over the latents' variance: 0 where both have the same mean
    and covariance, 1 where all codes lie at the latents' mean.

    The squared 2-Wasserstein distance of the Gaussians fitted to both (see :func:`gaussian_distance`), summed over
    groups. That codes lag behind latents that move away from them is the divergence of the two distributions of
    Huh et al., arXiv 2305.08842; between fitted Gaussians it is measured in Wasserstein VQ, arXiv 2506.15078.

    ``codes``: of each group what :func:`fit_codes` gives; their sizes add up to the latents'. NaN where latents have no
    variance.
    """
    variance = latents.variance()
    if not variance:
        return float("nan")
    mean, covariance = latents.mean(), latents.covariance()
    start, total = 0, 0.0
    for of_group in codes:
        place = slice(start, start + len(of_group[0]))
        total += gaussian_distance(mean[place], covariance[place, place], *of_group)
        start = place.stop
    return total / variance


def gaussian_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians: |μ_a − μ_b|² + tr(A + B − 2·(A^½ B A^½)^½).

    Dowson and Landau, "The Fréchet distance between multivariate normal distributions", 1982. Means ``(dim,)``,
    covariances ``(dim, dim)``, float64.
    """
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    inner = root @ covariance_b @ root
    overlap = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    apart = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * overlap
    return max(0.0, float(apart))
