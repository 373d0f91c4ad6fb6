"""ABX discrimination (Schatz et al., Interspeech 2013): is X, another case of A, nearer to A than to B?

In: frame features of segments. Out: the share of triples where it is not: 0.5 is guessing, 0 is perfect. Distances are
those of the ZeroSpeech and Libri-light evaluations: the angle between frames, meaned over the path of dynamic time
warping. Pure. fastabx, which computes the same, needs a newer Python than fairseq2 0.8 is pinned to here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

CHANCE = 0.5


def abx_error(a: Tensor, b: Tensor, x: Tensor) -> float:
    """Share of triples in which B is nearer to X than A is; a tie is half an error.

    *Shape:* a and b ``(triples, frames, dim)``, x ``(triples, frames of X, dim)``. Raises ValueError without a triple.
    """
    if not len(x):
        raise ValueError("ABX needs at least one triple of segments")
    right, wrong = warped_distances(a, x), warped_distances(b, x)
    return float(((right > wrong).double() + 0.5 * (right == wrong).double()).mean())


def angles(left: Tensor, right: Tensor) -> Tensor:
    """Angles between frames, over π: ``(pairs, m, dim)`` and ``(pairs, n, dim)`` → fp64 ``(pairs, m, n)`` in [0, 1]."""
    left, right = functional.normalize(left.double(), dim=-1), functional.normalize(right.double(), dim=-1)
    return (left @ right.transpose(1, 2)).clamp(-1, 1).acos() / math.pi


def warped_distances(left: Tensor, right: Tensor) -> Tensor:
    """Mean angle along the cheapest monotonous path from first frames to last: ``(pairs, m, dim)`` and
    ``(pairs, n, dim)`` → ``(pairs,)``.

    Of paths that cost the same, the diagonal step is taken first.
    """
    distances = angles(left, right)
    pairs, rows, columns = distances.shape
    cost = torch.full((pairs, rows + 1, columns + 1), math.inf, dtype=distances.dtype)
    steps = torch.zeros_like(cost)
    cost[:, 0, 0] = 0
    for row in range(rows):
        for column in range(columns):
            ways = torch.stack([cost[:, row, column], cost[:, row, column + 1], cost[:, row + 1, column]])
            lengths = torch.stack([steps[:, row, column], steps[:, row, column + 1], steps[:, row + 1, column]])
            least, way = ways.min(dim=0)
            cost[:, row + 1, column + 1] = least + distances[:, row, column]
            steps[:, row + 1, column + 1] = lengths.gather(0, way.unsqueeze(0))[0] + 1
    return cost[:, -1, -1] / steps[:, -1, -1]
