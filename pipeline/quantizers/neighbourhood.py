"""The grid of a Kohonen map and how codes share what they see with their neighbours on it.

In: a grid shape, a step, statistics by code. Out: coordinates, distances, shared statistics. Pure functions.

Code i stands at coordinate (i mod shape[0], i // shape[0] mod shape[1], …): the first axis runs fastest. Borders are
open. Source: Irie et al., arXiv 2302.07950, and the code they published, which differ in the Gaussian; both are here.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Neighbourhood = Literal["none", "hard", "gaussian", "exponential"]
NEIGHBOUR_DISTANCE = 1.5  # codes nearer than this on the grid are neighbours: diagonal ones too
BLOCK_ROWS = 1024  # rows of the codes × codes matrix that are held at once


def factorise(codes: int, dimensions: int = 2) -> tuple[int, ...]:
    """The squarest grid of ``codes`` codes: 512 → (32, 16), 12 → (3, 4); a prime number gives a line, 7 → (7, 1)."""
    if dimensions == 1:
        return (codes,)
    root = math.ceil(round(codes ** (1 / dimensions), 9))
    side = next(number for number in range(min(root, codes), 0, -1) if codes % number == 0)
    return (*factorise(codes // side, dimensions - 1), side)


def grid_coordinates(grid: Sequence[int]) -> Tensor:
    """Coordinates of each code: int64 ``(codes, len(grid))``."""
    index = torch.arange(math.prod(grid))
    axes = []
    for size in grid:
        axes.append(index % size)
        index = index // size
    return torch.stack(axes, dim=1)


def grid_distance(grid: Sequence[int]) -> Tensor:
    """Euclidean distance of each pair of codes on the grid: fp32 ``(codes, codes)``."""
    coordinates = grid_coordinates(grid).float()
    return torch.cdist(coordinates, coordinates, compute_mode="donot_use_mm_for_euclid_dist")


def arrange_on_grid(vectors: Tensor, grid: Sequence[int]) -> Tensor:
    """An order in which vectors that were found without the grid lie on it in a rough order of their own.

    vectors ``(codes, dim)`` → int64 ``(codes,)``: code i of the map takes ``vectors[order[i]]``. The slowest axis
    follows the first principal component, the next one the second within each slice, and so on.
    """
    centred = vectors.double() - vectors.double().mean(dim=0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh
    # a component's sign is arbitrary: its largest entry shall be positive
    peaks = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    positions = centred @ (directions * peaks.sign()).T  # (codes, components)

    def arrange(places: Tensor, sides: Sequence[int], component: int) -> Tensor:
        if component < positions.shape[1]:
            places = places[positions[places, component].argsort(stable=True)]
        if len(sides) == 1:
            return places
        slices = places.reshape(sides[-1], -1)
        return torch.cat([arrange(part, sides[:-1], component + 1) for part in slices])

    return arrange(torch.arange(len(vectors), device=vectors.device), grid, 0)


def hard_share(step: int, shrink_step: float) -> float:
    """What a neighbour gets of a code's statistics after ``step`` updates: 1 / (1 + τ·t)."""
    return 1.0 / (1.0 + shrink_step * step)


def neighbourhood_matrix(
    kind: Neighbourhood, grid: Sequence[int], step: int, shrink_step: float, base: float
) -> Tensor:
    """A(t), fp32 ``(codes, codes)``, symmetric with a diagonal of 1. For drawing and checking; training uses
    :func:`spread_over_grid`, which never makes it."""
    codes = math.prod(grid)
    eye = torch.eye(codes).unsqueeze(0)
    return spread_over_grid(eye, kind, grid, step, shrink_step, base)[0]


def spread_over_grid(
    statistics: Tensor, kind: Neighbourhood, grid: Sequence[int], step: int, shrink_step: float, base: float
) -> Tensor:
    """A(t)ᵀ statistics: ``(groups, codes, n)`` → the same shape, with G the distance on the grid and b = ``base``.

    ``hard``: 1 / (1 + τt) where G < 1.5. ``gaussian``: exp(−G²·(1 + τt) / b), the paper's formula. ``exponential``:
    exp(−G·(1 + τt) / b), what the published code computes. ``none``: statistics as they are.
    """
    if kind == "none":
        return statistics
    return statistics + gather_from_neighbours(statistics, kind, grid, step, shrink_step, base)


def gather_from_neighbours(
    statistics: Tensor, kind: Neighbourhood, grid: Sequence[int], step: int, shrink_step: float, base: float
) -> Tensor:
    """(A(t) − I)ᵀ statistics: what each code gets of the others', as :func:`spread_over_grid` has it, without its own.
    Nothing is subtracted for it, so that small shares keep their digits."""
    if kind == "none":
        return torch.zeros_like(statistics)
    statistics = statistics.contiguous()
    width = base * hard_share(step, shrink_step)
    if kind == "gaussian":
        return _gather_gaussian(statistics, grid, width)
    if kind == "exponential":
        return _gather_exponential(statistics, grid, width)
    total = torch.zeros_like(statistics)
    add_neighbours(total, statistics, grid, hard_share(step, shrink_step))
    return total


def add_neighbours(total: Tensor, statistics: Tensor, grid: Sequence[int], weight: float) -> None:
    """Add ``weight`` times the sum of each code's neighbours to ``total``, in place; both ``(groups, codes, n)``."""
    placed, to_place = _on_grid(statistics, grid), _on_grid(total, grid)
    for to, source in _shifts(tuple(reversed(grid))):
        to_place[to].add_(placed[source], alpha=weight)


@functools.cache
def _shifts(shape: tuple[int, ...]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For each direction to a neighbour: the places of ``(groups, *shape, …)`` that have one there, and that one."""
    shifts = []
    for offset in itertools.product((-1, 0, 1), repeat=len(shape)):
        if 0 < math.hypot(*offset) < NEIGHBOUR_DISTANCE:
            pairs = list(zip(offset, shape, strict=True))
            to = (slice(None), *(slice(max(0, shift), size + min(0, shift)) for shift, size in pairs))
            source = (slice(None), *(slice(max(0, -shift), size + min(0, -shift)) for shift, size in pairs))
            shifts.append((to, source))
    return shifts


def _on_grid(statistics: Tensor, grid: Sequence[int]) -> Tensor:
    """``(groups, codes, n)`` → ``(groups, *reversed(grid), n)``: the first axis of the grid is the fastest."""
    return statistics.view(statistics.shape[0], *reversed(grid), statistics.shape[-1])


def _gather_gaussian(statistics: Tensor, grid: Sequence[int], width: float) -> Tensor:
    """exp(−(x² + y²)/w) = exp(−x²/w)·exp(−y²/w): small products, axis by axis.

    With B the product of the axes so far and A the next one's, A·B − I = A·(B − I) + (A − I).
    """
    own = _on_grid(statistics, grid)
    gathered = torch.zeros_like(own)
    for axis, size in enumerate(reversed(grid), start=1):
        places = torch.arange(size, dtype=statistics.dtype, device=statistics.device)
        weights = torch.exp(-(places[:, None] - places[None, :]).square() / width)
        others = weights.clone().fill_diagonal_(0)
        gathered = _along(axis, gathered, weights) + _along(axis, own, others)
    return gathered.reshape(statistics.shape)


def _along(axis: int, placed: Tensor, weights: Tensor) -> Tensor:
    return torch.tensordot(placed, weights, dims=([axis], [0])).movedim(-1, axis)


def _gather_exponential(statistics: Tensor, grid: Sequence[int], width: float) -> Tensor:
    """Not separable: the matrix in blocks of rows."""
    coordinates = grid_coordinates(grid).to(statistics)
    blocks = []
    for rows in coordinates.split(BLOCK_ROWS):
        distance = torch.cdist(rows, coordinates, compute_mode="donot_use_mm_for_euclid_dist")
        weights = torch.exp(-distance / width) * (distance > 0)
        blocks.append(torch.einsum("rc,gcn->grn", weights, statistics))
    return torch.cat(blocks, dim=1)
