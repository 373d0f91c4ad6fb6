"""ABX and its warped distances against paths searched one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.evaluation.abx import abx_error, angles, warped_distances


def every_path(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """All monotonous paths from (0, 0) to the last cell."""
    if rows == columns == 1:
        return [[(0, 0)]]
    ways = [(rows - 1, columns), (rows, columns - 1), (rows - 1, columns - 1)]
    return [[*path, (rows - 1, columns - 1)] for m, n in ways if m and n for path in every_path(m, n)]


def searched(distances: Tensor) -> float:
    """Mean over the path of the least sum."""
    sums = [(sum(float(distances[cell]) for cell in path), len(path)) for path in every_path(*distances.shape)]
    total, length = min(sums)
    return total / length


def test_distances_are_those_of_the_cheapest_path() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 3, 5, generator=generator), torch.randn(6, 4, 5, generator=generator)
    expected = [searched(table) for table in angles(left, right)]
    assert warped_distances(left, right).tolist() == pytest.approx(expected)


def test_an_angle_is_a_share_of_half_a_turn() -> None:
    frames = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    found = angles(frames[:1].unsqueeze(0), frames.unsqueeze(0))[0, 0]
    assert found.tolist() == pytest.approx([0.0, 0.5, 1.0, 0.25], abs=1e-9)
    assert math.isfinite(float(angles(torch.zeros(1, 1, 2), frames[:1].unsqueeze(0))))  # silence has no direction


def test_x_slower_than_a_is_still_a() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(20, 6, 8, generator=generator), torch.randn(20, 6, 8, generator=generator)
    slower = a.repeat_interleave(2, dim=1)
    assert warped_distances(a, slower).abs().max() < 1e-6
    assert abx_error(a, b, slower) == 0
    assert abx_error(b, a, slower) == 1
    assert abx_error(a, a, slower) == 0.5  # no one can tell them


def test_no_triple_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one triple"):
        abx_error(torch.zeros(0, 3, 2), torch.zeros(0, 3, 2), torch.zeros(0, 3, 2))
