"""Kohonen's self-organising map trained by gradient: codes are parameters, and a loss ties neighbours on the grid.

Irie, Csordás, Schmidhuber, "Self-Organising Neural Discrete Representation Learning à la Kohonen", arXiv 2302.07950, in
the form of the code they published. In: latents. Out: the nearest codes. State: codes, a parameter for the optimiser;
the neighbourhood shrinks with the number of optimiser steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.quantizers.base import (
    NormaliseOptions,
    ProjectionOptions,
    Quantized,
    Quantizer,
    count_codes,
    look_up,
    mean_square,
    straight_through,
)
from pipeline.quantizers.ksom import GridMap, GridOptions
from pipeline.quantizers.learned import LearnedTable
from pipeline.quantizers.neighbourhood import gather_from_neighbours
from pipeline.quantizers.search import nearest_codes

SMALLEST_WEIGHT = 1e-30
"""Neighbours that pull less than this at a code have no mean to work out."""


class GDSOMConfig(GridOptions, ProjectionOptions, NormaliseOptions):
    """A Kohonen map trained by gradient; without a neighbourhood it is straight-through VQ."""

    kind: Literal["gd_som"] = "gd_som"
    codebook_weight: float = Field(1.0, ge=0, description="weight of the codes' pull towards their latents")
    commitment: float = Field(0.25, ge=0, description="weight of the latents' pull towards their codes")
    kohonen_weight: float = Field(1.0, ge=0, description="γ: weight of the pull of a chosen code's neighbours to it")


class GDSOMQuantizer(GridMap, Quantizer):
    """``loss = codebook_weight · mean((c − sg(z))²) + commitment · mean((sg(c) − z)²) + kohonen_weight · L``, with L of
    :meth:`pull_neighbours`.

    Neighbours go to the chosen code, not to its latent. L sums over features where the other two take a mean, as
    published, so what ``kohonen_weight`` means depends on ``dim``.
    """

    config: GDSOMConfig

    def __init__(self, config: GDSOMConfig) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups)
        self.code_vectors = LearnedTable(torch.randn(self.groups, self.codes, self.code_dim))

    def effective_codes(self) -> Tensor:
        """The codes as they are compared, looked up and learned: fp32 ``(groups, codes, code_dim)``."""
        return self.normalise(self.code_vectors())

    def codebook(self) -> Tensor:
        return self.effective_codes().detach()

    def quantize(self, latents: Tensor) -> Quantized:
        config = self.config
        codebook = self.effective_codes()
        codes = nearest_codes(self.split_groups(latents), codebook)
        vectors = look_up(codebook, codes).reshape(-1, self.codebook_dim)
        shares = count_codes(codes, self.codes) / max(1, len(codes))
        losses = {
            "codebook": config.codebook_weight * mean_square(vectors - latents.detach()),
            "commitment": config.commitment * mean_square(vectors.detach() - latents),
            "kohonen": config.kohonen_weight * self.pull_neighbours(codebook, shares),
        }
        return Quantized(straight_through(latents, vectors), codes, losses)

    def pull_neighbours(self, codebook: Tensor, shares: Tensor) -> Tensor:
        """L = (1/N) Σ_i Σ_j A_{q(i)j}(t) ‖W_j − sg(W_{q(i)})‖², a mean over groups; a scalar, differentiable in W.

        codebook W ``(groups, codes, code_dim)``, shares n_k/N ``(groups, codes)``: the part of the tokens of each code.

        Tokens count by their codes only: L = Σ_j m_j·‖W_j − μ_j‖² + s_j, where m_j, μ_j and s_j are the weight, the
        mean and the scatter of the codes that pull at code j, from sums over the grid. Nothing has the size of
        tokens × codes.
        """
        weights = shares.unsqueeze(-1)
        # Far from the origin squares are large, nearly equal, and fp32 loses their difference.
        centre = (weights * codebook.detach()).sum(dim=1, keepdim=True)
        centred = codebook - centre
        fixed = centred.detach()
        squares = fixed.square().sum(dim=-1, keepdim=True)
        joined = torch.cat([weights, weights * fixed, weights * squares], dim=-1)  # (groups, codes, code_dim + 2)
        pulling = gather_from_neighbours(joined, *self.neighbourhood())
        weight, sums, square_sums = pulling[..., :1], pulling[..., 1:-1], pulling[..., -1:]
        means = sums / weight.clamp(min=SMALLEST_WEIGHT)
        scatter = (square_sums - weight * means.square().sum(dim=-1, keepdim=True)).clamp(min=0)
        distances = (centred - means).square().sum(dim=-1, keepdim=True)
        return (weight * distances + scatter).sum() / self.groups

    def assign(self, latents: Tensor) -> Tensor:
        return nearest_codes(self.split_groups(latents), self.codebook())

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Codes that come in no order are laid on the grid along their principal components first."""
        self.code_vectors.weight.copy_(self.lay_on_grid(codebook)[0])
