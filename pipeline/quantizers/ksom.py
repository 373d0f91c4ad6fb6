"""Kohonen's self-organising map as a quantizer: EMA-VQ whose codes stand on a grid and learn from their neighbours.

Irie, Csordás, Schmidhuber, "Self-Organising Neural Discrete Representation Learning à la Kohonen", arXiv 2302.07950.
In: latents. Out: the nearest codes. State: EMA-VQ's; the neighbourhood shrinks with the number of optimiser steps.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.quantizers.base import QuantizerOptions
from pipeline.quantizers.ema import EMAQuantizer, MovingAverageOptions
from pipeline.quantizers.neighbourhood import (
    NEIGHBOUR_DISTANCE,
    Neighbourhood,
    add_neighbours,
    arrange_on_grid,
    factorise,
    grid_coordinates,
    grid_distance,
    hard_share,
    spread_over_grid,
)


class GridShape(QuantizerOptions):
    """For kinds whose codes stand on a grid."""

    grid: tuple[int, ...] | None = Field(
        None, description="shape of the map, such as [32, 16]; none: the squarest two-dimensional one"
    )

    @model_validator(mode="after")
    def _grid_holds_the_codes(self) -> Any:
        if self.grid is None:
            return self
        if not self.grid or min(self.grid) < 1:
            raise ValueError(f"grid={list(self.grid)} has a side below 1: use {list(factorise(self.codes))}")
        if math.prod(self.grid) != self.codes:
            raise ValueError(
                f"grid={list(self.grid)} holds {math.prod(self.grid)} codes, codes={self.codes}: "
                f"use a grid that multiplies to {self.codes}, such as {list(factorise(self.codes))}"
            )
        return self


class GridOptions(GridShape):
    """For kinds whose codes share what they learn with the codes around."""

    neighbourhood: Neighbourhood = Field(
        "hard", description="hard: the codes around; gaussian: the paper's formula; exponential: the published code's"
    )
    shrink_step: float = Field(0.1, ge=0, description="τ: how fast the neighbourhood shrinks, per optimiser step")
    base: float = Field(10.0, gt=0, description="b: width of the gaussian and exponential neighbourhood at the start")


class GridMap:
    """What a quantizer whose configuration has :class:`GridShape` says of its map; each group has one."""

    config: Any
    updates: Tensor

    @property
    def grid(self) -> tuple[int, ...]:
        """Shape of the map; the first axis runs fastest."""
        return self.config.grid or factorise(self.config.codes)

    def grid_places(self) -> Tensor:
        """Where each code stands: fp32 ``(codes, axes)``."""
        return grid_coordinates(self.grid).float()

    def grid_distance(self) -> Tensor:
        """Euclidean distance of each pair of codes on the grid: fp32 ``(codes, codes)``."""
        return grid_distance(self.grid)

    def are_neighbours(self, code_a: Tensor, code_b: Tensor) -> Tensor:
        """True where two codes, int64 of one shape, touch on the grid (diagonally too) or are the same."""
        places = self.grid_places().to(code_a.device)
        apart = (places[code_a] - places[code_b]).square().sum(dim=-1).sqrt()
        return torch.as_tensor(apart < NEIGHBOUR_DISTANCE)

    def neighbourhood(self) -> tuple[Neighbourhood, tuple[int, ...], int, float, float]:
        """A(t) of the next update, as :func:`spread_over_grid` takes it: kind, grid, t, τ and b."""
        config = self.config
        return config.neighbourhood, self.grid, int(self.updates), config.shrink_step, config.base

    def lay_on_grid(self, codebook: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes ``(groups, codes, code_dim)`` that come in no order, along their principal components on the grid; and
        their counts ``(groups, codes)`` with them."""
        order = torch.stack([arrange_on_grid(vectors, self.grid) for vectors in codebook])  # (groups, codes)
        ordered = codebook.gather(1, order.unsqueeze(-1).expand_as(codebook))
        return ordered, None if counts is None else counts.gather(1, order)


class KSOMConfig(MovingAverageOptions, GridOptions):
    """A Kohonen map; without a neighbourhood it is EMA-VQ."""

    kind: Literal["ksom"] = "ksom"


class KSOMQuantizer(GridMap, EMAQuantizer):
    """EMA-VQ with :meth:`spread` over the grid."""

    config: KSOMConfig

    def average(self, counts: Tensor, sums: Tensor) -> None:
        kind, grid, step, shrink_step, _ = self.neighbourhood()
        if kind == "hard":  # with nothing of the codebook's size beside it
            super().average(counts, sums)
            weight = (1 - self.config.decay) * hard_share(step, shrink_step)
            add_neighbours(self.code_counts.unsqueeze(-1), counts.unsqueeze(-1), grid, weight)
            add_neighbours(self.code_sums, sums, grid, weight)
        elif kind == "none":
            super().average(counts, sums)
        else:
            spread = self.spread(torch.cat([counts.unsqueeze(-1), sums], dim=-1))
            super().average(spread[..., 0], spread[..., 1:])

    def spread(self, statistics: Tensor) -> Tensor:
        return spread_over_grid(statistics, *self.neighbourhood())

    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        super().set_codebook(*self.lay_on_grid(codebook, counts))
