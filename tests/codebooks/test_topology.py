"""Topographic error, rank correlation and U-matrix against grids worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipeline.codebooks.topology import find_torn, grid_correlation, nearest_codes, on_grid, ranks, u_matrix


def line_neighbours(first: Tensor, second: Tensor) -> Tensor:
    return (first - second).abs() <= 1


def line_distance(codes: int) -> Tensor:
    places = torch.arange(codes)
    return (places[:, None] - places).abs().float()


def test_nearest_codes_in_order() -> None:
    codebook = torch.tensor([[0.0], [10.0], [3.0]])
    nearest = nearest_codes(torch.tensor([[1.0], [9.0]]), codebook, number=3, chunk=1)
    assert nearest.tolist() == [[0, 2, 1], [1, 2, 0]]


def test_nearest_codes_agree_with_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(300, 5, generator=generator), torch.randn(40, 5, generator=generator)
    expected = torch.cdist(latents.double(), codebook.double()).argsort(dim=1)[:, :2]
    assert torch.equal(nearest_codes(latents, codebook, chunk=64), expected)


def test_a_codebook_of_one_has_no_second() -> None:
    with pytest.raises(ValueError, match="1 codes has no 2 nearest"):
        nearest_codes(torch.zeros(3, 2), torch.zeros(1, 2))


def test_topographic_error_on_a_folded_line() -> None:
    """Codes 0, 1, 2 lie on a line; in space code 2 lies between 0 and 1, so latents between 0 and 2 are torn."""
    codebook = torch.tensor([[0.0], [2.0], [1.0]])
    latents = torch.tensor([[0.1], [0.4], [1.6], [1.9]])  # best two: (0, 2), (0, 2), (1, 2), (1, 2)
    assert find_torn(latents, codebook, line_neighbours, chunk=3).tolist() == [True, True, False, False]


def test_an_ordered_line_is_not_torn() -> None:
    codebook = torch.arange(6.0)[:, None]
    latents = torch.linspace(0, 5, 57)[:, None]
    assert not find_torn(latents, codebook, line_neighbours).any()


def test_ranks_share_ties() -> None:
    assert ranks(torch.tensor([10.0, 20.0, 10.0, 5.0])).tolist() == [2.5, 4.0, 2.5, 1.0]


def test_correlation_of_ordered_and_of_shuffled_codes() -> None:
    ordered = torch.arange(8.0)[:, None].repeat(1, 3)
    assert grid_correlation(ordered, line_distance(8)) == pytest.approx(1.0)
    shuffled = ordered[torch.tensor([3, 7, 0, 5, 2, 6, 1, 4])]
    assert abs(grid_correlation(shuffled, line_distance(8))) < 0.5


def test_correlation_worked_out_by_hand() -> None:
    """Codes at 0, 3, 1: distances of pairs (01, 02, 12) are 3, 1, 2 in space and 1, 2, 1 on the grid."""
    space, grid = [3.0, 1.0, 2.0], [1.5, 3.0, 1.5]
    covariance = sum((a - 2) * (b - 2) for a, b in zip(space, grid, strict=True))
    expected = covariance / math.sqrt(sum((a - 2) ** 2 for a in space) * sum((b - 2) ** 2 for b in grid))
    assert grid_correlation(torch.tensor([[0.0], [3.0], [1.0]]), line_distance(3)) == pytest.approx(expected)


def test_correlation_of_a_collapsed_codebook_is_not_a_number() -> None:
    assert math.isnan(grid_correlation(torch.zeros(5, 2), line_distance(5)))


def test_u_matrix_shows_the_border() -> None:
    codebook = torch.tensor([[0.0], [1.0], [9.0], [10.0]])
    assert u_matrix(codebook, [4], line_neighbours).tolist() == [1.0, 4.5, 4.5, 1.0]


def test_the_first_grid_axis_is_fastest() -> None:
    placed = on_grid(torch.arange(6), [2, 3])
    assert placed.tolist() == [[0, 2, 4], [1, 3, 5]]
    colours = on_grid(torch.arange(12).reshape(6, 2), [2, 3])
    assert colours.shape == (2, 3, 2)
    assert colours[1, 2].tolist() == [10, 11]
