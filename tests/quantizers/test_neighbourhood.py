"""Grids and neighbourhoods: pure functions, against the published code's values and against plain matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quantizers.neighbourhood import (
    arrange_on_grid,
    factorise,
    gather_from_neighbours,
    grid_coordinates,
    grid_distance,
    neighbourhood_matrix,
    spread_over_grid,
)


@pytest.mark.parametrize(
    ("codes", "dimensions", "grid"),
    [
        (512, 2, (32, 16)),
        (128, 2, (16, 8)),
        (256, 2, (16, 16)),
        (1024, 2, (32, 32)),
        (12, 2, (3, 4)),
        (7, 2, (7, 1)),
        (512, 1, (512,)),
        (512, 3, (8, 8, 8)),
    ],
)
def test_squarest_grids(codes, dimensions, grid):
    assert factorise(codes, dimensions) == grid


def test_the_first_axis_runs_fastest():
    coordinates = grid_coordinates([32, 16])
    assert coordinates[1].tolist() == [1, 0]
    assert coordinates[32].tolist() == [0, 1]
    assert coordinates[511].tolist() == [31, 15]


def test_distances_are_euclidean_and_borders_open():
    distance = grid_distance([4, 3])
    assert distance[0, 3] == 3  # no wrap-around
    assert distance[0, 5] == pytest.approx(math.sqrt(2))
    assert torch.equal(distance, distance.T)


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (1, 0.90909), (10, 0.5), (100, 0.090909), (30_000, 0.00033322)])
def test_hard_values(step, share):
    matrix = neighbourhood_matrix("hard", [5, 4], step, 0.1, 10.0)
    assert matrix[0, 1] == pytest.approx(share, rel=1e-4)
    others = (matrix > 0).sum(dim=1) - 1
    assert others[0] == 3  # a corner
    assert others[1] == 5  # an edge
    assert others[6] == 8
    assert (neighbourhood_matrix("hard", [5], step, 0.1, 10.0)[2] > 0).sum() == 3


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.904837), (1, 0.895834), (10, 0.818731), (100, 0.332871), (1000, 4.108e-5), (30_000, 0)]
)
def test_exponential_values_are_the_published_codes(step, value):
    assert neighbourhood_matrix("exponential", [5], step, 0.1, 10.0)[0, 1] == pytest.approx(value, rel=1e-4, abs=1e-12)


def test_gaussian_is_the_papers_and_exponential_the_codes():
    diagonal = (0, 3)  # √2 apart on a 2 × 2 grid
    assert neighbourhood_matrix("exponential", [2, 2], 0, 0.1, 10.0)[diagonal] == pytest.approx(0.868123, abs=1e-6)
    assert neighbourhood_matrix("gaussian", [2, 2], 0, 0.1, 10.0)[diagonal] == pytest.approx(0.818731, abs=1e-6)


def _plain_matrix(kind: str, grid: list[int], step: int, shrink: float, base: float) -> torch.Tensor:
    distance, factor = grid_distance(grid).double(), 1 + shrink * step
    if kind == "none":
        return torch.eye(len(distance)).double()
    if kind == "hard":
        matrix = (distance < 1.5).double() / factor
    else:
        matrix = torch.exp(-(distance if kind == "exponential" else distance**2) * factor / base)
    return matrix.fill_diagonal_(1)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["none", "hard", "gaussian", "exponential"]),
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    step=st.integers(0, 50),
)
def test_spreading_is_a_product_with_the_plain_matrix(kind, grid, step):
    statistics = torch.randn(2, math.prod(grid), 3, generator=torch.Generator().manual_seed(step))
    matrix = _plain_matrix(kind, grid, step, 0.2, 4.0)
    expected = torch.einsum("rc,gcn->grn", matrix, statistics.double()).float()
    spread = spread_over_grid(statistics, kind, grid, step, 0.2, 4.0)
    torch.testing.assert_close(spread, expected, rtol=1e-5, atol=1e-5)
    of_others = torch.einsum("rc,gcn->grn", matrix - torch.eye(len(matrix)), statistics.double())
    gathered = gather_from_neighbours(statistics.double(), kind, grid, step, 0.2, 4.0)
    torch.testing.assert_close(gathered, of_others, rtol=1e-6, atol=1e-6)  # distances are fp32
    made = neighbourhood_matrix(kind, grid, step, 0.2, 4.0)
    assert torch.allclose(made, made.T)
    assert torch.equal(made.diagonal(), torch.ones(len(made)))


@pytest.mark.parametrize(("kind", "step"), [("hard", 10**9), ("gaussian", 300), ("exponential", 300)])
def test_small_shares_of_neighbours_keep_their_digits(kind, step):
    """Subtracting each code's own part of 1 would leave nothing of 1e-8 in fp32."""
    ones = torch.ones(1, 12, 1)
    gathered = gather_from_neighbours(ones, kind, [4, 3], step, 0.1, 2.0)
    matrix = _plain_matrix(kind, [4, 3], step, 0.1, 2.0).fill_diagonal_(0)
    assert 0 < float(gathered.max()) < 1e-5
    torch.testing.assert_close(gathered[0, :, 0].double(), matrix.sum(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("grid", [[5, 4], [4, 5], [20], [2, 2, 5]])
def test_arranging_is_a_permutation(grid):
    vectors = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    order = arrange_on_grid(vectors, grid)
    assert sorted(order.tolist()) == list(range(20))
    assert torch.equal(vectors[order], vectors[torch.arange(20)[order]])


def test_a_line_is_arranged_along_its_direction():
    vectors = torch.arange(10.0)[torch.randperm(10)].unsqueeze(1) * torch.tensor([1.0, 2.0])
    steps = vectors[arrange_on_grid(vectors, [10])][:, 0].diff()
    assert (steps.abs() == 1).all()
