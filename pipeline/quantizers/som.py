"""A self-organising map beside a model: prototypes on a grid learn with the encoder, and latents go on as they are.

Luo and Yuan, "Simple Self-Organizing Map with Visual Transformer" (ViT-SOM), IEEE Signal Processing Letters 2025, DOI
10.1109/LSP.2025.3643388, in the form of the code they published. In: latents. Out: the latents themselves, and the best
matching unit of each. State: prototypes, a parameter for the optimiser; temperature and weight follow the number of
optimiser steps.

Published configurations decay prototypes with the optimiser's default of .01; here no codebook is ever decayed. Under
the cosine distance length means nothing, and only how far a step turns a prototype depends on it.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional

from pipeline.quantizers.base import Quantized, Quantizer
from pipeline.quantizers.ksom import GridMap, GridShape
from pipeline.quantizers.learned import LearnedTable
from pipeline.quantizers.neighbourhood import grid_coordinates

Distance = Literal["cosine", "euclidean", "manhattan"]
Topology = Literal["square", "hexagonal"]
Reduction = Literal["mean", "sum_over_prototypes"]

CHUNK_ELEMENTS = 1 << 24
"""Distances that are held at once at inference."""


class SOMConfig(GridShape):
    """The map of ViT-SOM."""

    kind: Literal["som"] = "som"
    distance: Distance = Field("cosine", description="of latents and prototypes")
    topology: Topology = Field(
        "square", description="hexagonal: every other row of a two-dimensional grid half a place aside, six neighbours"
    )
    temperature: tuple[float, float] = Field(
        (20.0, 0.001), description="width of the neighbourhood, in places of the grid, at the first and the last step"
    )
    weight: float = Field(0.005, ge=0, description="γ: weight of the loss, reached from 0 halfway through the steps")
    steps: int | None = Field(
        None, ge=2, description="optimiser steps of both schedules; none: training.steps of the recipe"
    )
    reduction: Reduction = Field(
        "mean", description="over prototypes; γ of one is γ·codes of the other, DESOM has sum_over_prototypes"
    )

    @model_validator(mode="after")
    def _one_map_that_can_be_laid(self) -> SOMConfig:
        if self.groups != 1:
            raise ValueError(f"groups={self.groups}: latents are compared whole with the prototypes of one map: use 1")
        high, low = self.temperature
        if not high >= low > 0:
            raise ValueError(f"temperature=[{high:g}, {low:g}] must fall and stay above 0: use for example [20, 0.001]")
        if self.topology == "hexagonal" and self.grid is not None and len(self.grid) != 2:
            raise ValueError(f"grid={list(self.grid)} has no hexagonal topology: use a grid of two sides")
        return self


class SOMQuantizer(GridMap, Quantizer):
    """``loss = γ(s) · mean(h · d)`` over tokens and prototypes, with d the distances, b the nearest prototype and
    h = exp(−|g_j − g_b|² / 2T(s)²) on the grid.

    Gradients go to prototypes and latents. ``vectors`` are the latents: the map stands beside decoder and head.
    """

    config: SOMConfig
    coordinates: Tensor
    compares_latents = False  # vectors are no codes' vectors

    def __init__(self, config: SOMConfig) -> None:
        assert config.dim is not None
        if config.steps is None:
            raise ValueError("quantizer.steps is missing: give the optimiser steps that temperature and weight follow")
        super().__init__(config, dim=config.dim, codes=config.codes, groups=1)
        prototypes = torch.rand(1, self.codes, self.dim)
        self.prototypes = LearnedTable(
            functional.normalize(prototypes, dim=-1) if config.distance == "cosine" else prototypes
        )
        self.register_buffer("coordinates", map_coordinates(self.grid, config.topology), persistent=False)

    def grid_places(self) -> Tensor:
        return self.coordinates

    def grid_distance(self) -> Tensor:
        return torch.cdist(self.coordinates, self.coordinates, compute_mode="donot_use_mm_for_euclid_dist")

    def temperature(self) -> Tensor:
        """T of the next update: fp32 scalar."""
        high, low = self.config.temperature
        assert self.config.steps is not None
        return temperature_at(self.updates.double(), self.config.steps, high, low).float()

    def weight(self) -> Tensor:
        """γ of the next update, and at inference γ in full: fp32 scalar."""
        assert self.config.steps is not None
        rise = (self.updates / max(1, self.config.steps // 2)).clamp(max=1.0)
        return self.config.weight * (rise if self.training else torch.ones_like(rise))

    def distances(self, latents: Tensor) -> Tensor:
        """Latents ``(tokens, dim)`` to prototypes: ``(tokens, codes)``, differentiable."""
        return map_distances(latents, self.prototypes()[0], self.config.distance)

    def codebook(self) -> Tensor:
        prototypes = self.prototypes().detach()
        return functional.normalize(prototypes, dim=-1) if self.config.distance == "cosine" else prototypes

    def quantize(self, latents: Tensor) -> Quantized:
        distances = self.distances(latents)
        codes = distances.argmin(dim=1)
        temperature = self.temperature()
        shares = neighbour_shares(codes, self.coordinates, temperature)
        weight = self.weight()
        nearest = distances.detach().topk(2, dim=1, largest=False)
        metrics = {
            "temperature": temperature,
            "weight": weight,
            "distance": nearest.values[:, 0].mean(),
            "topographic_error": (~self.are_neighbours(*nearest.indices.unbind(dim=1))).float().mean(),
        }
        losses = {"som": weight * map_loss(distances, shares, self.config.reduction)}
        return Quantized(latents, codes.unsqueeze(1), losses, metrics)

    def assign(self, latents: Tensor) -> Tensor:
        rows = max(1, CHUNK_ELEMENTS // self.codes)
        return torch.cat([self.distances(part).argmin(dim=1, keepdim=True) for part in latents.split(rows)])

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Prototypes that come in no order are laid on the grid along their principal components first."""
        self.prototypes.weight.copy_(self.lay_on_grid(codebook)[0])


def map_coordinates(grid: tuple[int, ...], topology: Topology) -> Tensor:
    """Where each prototype stands: fp32 ``(codes, axes)``, neighbours 1 apart; the first axis of ``grid`` is the
    fastest, and in a hexagonal map the one that every other row is moved along by half a place."""
    places = grid_coordinates(grid).float()
    if topology == "square":
        return places
    column, row = places.unbind(dim=1)
    return torch.stack([column + 0.5 * (row % 2), row * (math.sqrt(3) / 2)], dim=1)


def map_distances(latents: Tensor, prototypes: Tensor, distance: Distance) -> Tensor:
    """latents ``(tokens, dim)``, prototypes ``(codes, dim)`` → ``(tokens, codes)``: 1 − cos, or the Euclidean or the
    Manhattan distance, not squared."""
    if distance == "cosine":
        return 1 - functional.normalize(latents, dim=-1) @ functional.normalize(prototypes, dim=-1).T
    return torch.cdist(latents, prototypes, p=2.0 if distance == "euclidean" else 1.0)


def neighbour_shares(codes: Tensor, coordinates: Tensor, temperature: Tensor | float) -> Tensor:
    """h: how much each prototype takes part in what ``codes (tokens,)`` learn; ``(tokens, prototypes)``, 1 for
    themselves. ``coordinates (prototypes, axes)``."""
    apart = (coordinates[codes].unsqueeze(1) - coordinates).square().sum(dim=-1)
    return torch.exp(-apart / (2 * temperature**2))


def map_loss(distances: Tensor, shares: Tensor, reduction: Reduction) -> Tensor:
    """Mean of h·d over tokens, and over prototypes or their sum; 0 for no tokens. Both ``(tokens, prototypes)``."""
    tokens, prototypes = distances.shape
    total = (shares * distances).sum() / max(1, tokens)
    return total / prototypes if reduction == "mean" else total


def temperature_at(step: Tensor | float, steps: float, high: float, low: float) -> Tensor:
    """T = high · (low / high)^(step / (steps − 1)), ``low`` from the last step on; a float64 scalar."""
    progress = (torch.as_tensor(step, dtype=torch.float64) / (steps - 1)).clamp(max=1.0)
    return high * torch.pow(low / high, progress)
