"""How well a codebook that lies on a grid keeps neighbours together.

In: latents, a codebook and the grid's distances. Out: numbers and the U-matrix. Pure functions; no state, no files.

Sources: topographic error, Kiviluoto, "Topology preservation in self-organizing maps", ICNN 1996; U-matrix, Ultsch
and Siemon, "Kohonen's self organizing feature maps for exploratory data analysis", INNC 1990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

CORRELATED_CODES = 2048
"""Codes that the correlation looks at, at most: its pairs grow with the square of the codebook."""


def nearest_codes(latents: Tensor, codebook: Tensor, number: int = 2, chunk: int = 8192) -> Tensor:
    """The ``number`` codes nearest to each latent, nearest first, by squared Euclidean distance.

    latents ``(tokens, dim)``, codebook ``(codes, dim)`` → int64 ``(tokens, number)``. Raises ValueError when the
    codebook has fewer codes than asked for.
    """
    if codebook.shape[0] < number:
        raise ValueError(f"a codebook of {codebook.shape[0]} codes has no {number} nearest codes: use {number} or more")
    codebook = codebook.float()
    # |z|² is the same for every code of a row, so it plays no part in the order.
    lengths = codebook.square().sum(1)
    parts = [
        torch.topk(torch.addmm(lengths, part.float(), codebook.T, alpha=-2.0), number, dim=1, largest=False).indices
        for part in latents.split(chunk)
    ]
    return torch.cat(parts) if parts else torch.empty(0, number, dtype=torch.int64)


def find_torn(
    latents: Tensor, codebook: Tensor, are_neighbours: Callable[[Tensor, Tensor], Tensor], chunk: int = 8192
) -> Tensor:
    """Which latents have two nearest codes that are not neighbours on the grid: bool ``(tokens,)``.

    latents ``(tokens, dim)``, codebook ``(codes, dim)``; ``are_neighbours`` takes two int64 tensors ``(tokens,)`` and
    gives bool ``(tokens,)``. The topographic error of a set is the share of these latents.
    """
    nearest = nearest_codes(latents, codebook, chunk=chunk)
    return ~are_neighbours(nearest[:, 0], nearest[:, 1])


def grid_correlation(codebook: Tensor, grid_distance: Tensor) -> float:
    """Spearman's rank correlation of the codes' distance on the grid and in space, over all pairs.

    codebook ``(codes, dim)``, grid_distance ``(codes, codes)`` → −1 … 1; NaN where either distance is constant. Of
    more than :data:`CORRELATED_CODES` codes, evenly spread ones are taken.
    """
    if codebook.shape[0] > CORRELATED_CODES:
        chosen = spread_codes(codebook.shape[0], CORRELATED_CODES)
        codebook, grid_distance = codebook[chosen], grid_distance[chosen][:, chosen]
    codes = codebook.shape[0]
    first, second = torch.triu_indices(codes, codes, offset=1)
    in_space = torch.cdist(codebook.double(), codebook.double())[first, second]
    # Distances that are equal but for rounding must tie: sqrt(2) reached over two paths.
    on_grid = grid_distance.double()[first, second].mul(1e9).round()
    return pearson(ranks(in_space), ranks(on_grid))


def spread_codes(codes: int, most: int) -> Tensor:
    """Evenly spread codes, ``most`` of them, or all when there are fewer: int64, ascending."""
    return torch.linspace(0, codes - 1, min(codes, most)).long()


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 on, equal values sharing their mean rank: ``(n,)`` → float64 ``(n,)``, on the CPU."""
    unsorted = values.cpu().numpy()
    order = np.argsort(unsorted)  # several times faster than torch's
    ascending = unsorted[order]
    place = np.cumsum(np.concatenate([[False], ascending[1:] != ascending[:-1]]))  # of each value among distinct ones
    counts = np.bincount(place)
    ranked = np.empty(len(order))
    ranked[order] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return torch.from_numpy(ranked)


def pearson(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two float64 vectors, NaN where one is constant."""
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first.square().sum() * second.square().sum()))
    return float(first @ second) / scale if scale else math.nan


def u_matrix(codebook: Tensor, grid: Sequence[int], are_neighbours: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Each code's mean distance to its grid neighbours, laid out on the grid: high values are borders between clusters.

    codebook ``(codes, dim)``, grid ``(rows, columns, …)`` with the first axis fastest → float ``(rows, columns, …)``.
    """
    codes = codebook.shape[0]
    everyone = torch.arange(codes)
    total, number = torch.zeros(codes, dtype=torch.float64), torch.zeros(codes, dtype=torch.float64)
    for code in range(codes):
        beside = are_neighbours(torch.full((codes,), code), everyone) & (everyone != code)
        total[code] = (codebook[beside].double() - codebook[code].double()).norm(dim=1).sum()
        number[code] = beside.sum()
    return on_grid(total / number.clamp(min=1), grid).float()


def on_grid(values: Tensor, grid: Sequence[int]) -> Tensor:
    """Values of the codes ``(codes, …)`` at their places on the grid ``(*grid, …)``; index 1 is at (1, 0, …)."""
    axes = len(grid)
    shaped = values.reshape(*reversed(grid), *values.shape[1:])
    return shaped.permute(*reversed(range(axes)), *range(axes, shaped.dim()))
