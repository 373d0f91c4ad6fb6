"""Straight-through VQ whose codes share an affine map: codes that no token chose move with the others.

Huh et al., arXiv 2305.08842, section 4.1 and appendix A.9, with the corrected equations 40–45. In: latents. Out: the
nearest of the codes s·C + b. State: codes C; learned s and b, or running statistics of latents and codes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.quantizers.learned import LearnedTable
from pipeline.quantizers.ste import STEQuantizer, StraightThroughOptions

VARIANCE_FLOOR = 1e-8
LARGEST_SCALE = 1e3
"""A feature in which all codes are equal has no variance to scale: its s is cut here."""


class AffineConfig(StraightThroughOptions):
    """Straight-through VQ with affine codes."""

    kind: Literal["affine"] = "affine"
    affine: Literal["learned", "running"] = Field(
        "running", description="learned: s and b are parameters; running: they match the codes' moments to the latents'"
    )
    affine_lr: float = Field(1.0, gt=0, description="learned only: step of s and b relative to the codes'")
    affine_momentum: float = Field(0.1, gt=0, le=1, description="running only: share that a step's statistics get")
    affine_groups: int = Field(1, ge=1, description="contiguous blocks of codes with a map of their own")

    @model_validator(mode="after")
    def _blocks_are_equal(self) -> Any:
        if self.codes % self.affine_groups:
            divisors = [number for number in range(1, self.codes + 1) if self.codes % number == 0]
            raise ValueError(
                f"affine_groups={self.affine_groups} can't share codes={self.codes} equally: "
                f"use affine_groups={', '.join(map(str, divisors[:8]))}"
            )
        return self


class AffineQuantizer(STEQuantizer):
    """Effective codes ``s·C + b``, by feature and by block of codes; normalisation comes after the map.

    ``learned``: s = 1 + a·θ_s, b = a·θ_b with a = ``affine_lr``; under plain SGD s and b move by a² as much as
    parameters of their own would. ``running``: s = σ_z/σ_C and b = μ_z − s·μ_C. The first step's statistics are taken
    whole, later ones by ``affine_momentum``; until the first step the map is the identity.
    """

    config: AffineConfig
    latent_mean: Tensor
    latent_variance: Tensor
    code_mean: Tensor
    code_variance: Tensor
    has_statistics: Tensor

    def __init__(self, config: AffineConfig) -> None:
        super().__init__(config)
        by_block = (self.groups, config.affine_groups, self.code_dim)
        if config.affine == "learned":
            self.scale_step = LearnedTable(torch.zeros(by_block))
            self.shift_step = LearnedTable(torch.zeros(by_block))
            return
        for name, shape in {"latent": (self.groups, 1, self.code_dim), "code": by_block}.items():
            self.register_buffer(f"{name}_mean", torch.zeros(shape, dtype=torch.float32))
            self.register_buffer(f"{name}_variance", torch.ones(shape, dtype=torch.float32))
        self.register_buffer("has_statistics", torch.zeros((), dtype=torch.bool))
        self.declare_statistic("latent_sums", self.groups, 2, self.code_dim)
        # Codes are the same on all ranks. Their moments travel all the same: by the time of the update the optimiser
        # has moved the codes that the latents were compared with. The number of forwards makes a mean of the sum.
        self.declare_statistic("forwards", 1)
        self.declare_statistic("code_moments", 2, *by_block)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """s and b by block: fp32 ``(groups, affine_groups, code_dim)``."""
        if self.config.affine == "learned":
            step = self.config.affine_lr
            return 1.0 + step * self.scale_step(), step * self.shift_step()
        # c_std = σ_z/σ_C and c_mean = μ_z − (σ_z/σ_C)·μ_C: equations 44 and 45 print them swapped.
        scale = (self.latent_variance / (self.code_variance + VARIANCE_FLOOR)).sqrt().clamp(max=LARGEST_SCALE)
        shift = self.latent_mean - scale * self.code_mean
        return (
            torch.where(self.has_statistics, scale, torch.ones_like(scale)),
            torch.where(self.has_statistics, shift, torch.zeros_like(shift)),
        )

    def effective_codes(self, raw: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        moved = self._by_block(raw) * scale.unsqueeze(2) + shift.unsqueeze(2)
        return self.normalise(moved.reshape(self.groups, self.codes, self.code_dim))

    def invert(self, effective: Tensor) -> Tensor:
        # A latent written into C itself would become s·z + b.
        scale, shift = self.scale_and_shift()
        safe = torch.where(scale.abs() < VARIANCE_FLOOR, torch.ones_like(scale), scale)
        raw = (self._by_block(effective) - shift.unsqueeze(2)) / safe.unsqueeze(2)
        return raw.reshape(self.groups, self.codes, self.code_dim)

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        super().observe(latents, codes)
        if self.config.affine == "learned":
            return
        # Relative to the running mean, which is the same on all ranks: squares of large numbers would cancel.
        centred = self.split_groups(latents) - self.latent_mean.squeeze(1)
        self.add_statistic("latent_sums", torch.stack([centred.sum(dim=0), centred.square().sum(dim=0)], dim=1))
        blocks = self._by_block(self.code_vectors())
        self.add_statistic("forwards", torch.ones(1, device=latents.device))
        self.add_statistic("code_moments", torch.stack([blocks.mean(dim=2), blocks.var(dim=2, correction=0)]))

    def update(self, statistics: dict[str, Tensor]) -> None:
        tokens = statistics["usage"][0].sum()
        if self.config.affine == "learned" or not bool(tokens):
            return
        offset, square = (statistics["latent_sums"] / tokens).unsqueeze(1).unbind(dim=2)  # (groups, 1, code_dim)
        means, variances = statistics["code_moments"] / statistics["forwards"]
        momentum = self.config.affine_momentum if bool(self.has_statistics) else 1.0
        self.latent_variance.lerp_((square - offset.square()).clamp(min=0), momentum)
        self.latent_mean.lerp_(self.latent_mean + offset, momentum)
        self.code_mean.lerp_(means, momentum)
        self.code_variance.lerp_(variances, momentum)
        self.has_statistics.fill_(True)

    def _by_block(self, codes: Tensor) -> Tensor:
        """``(groups, codes, code_dim)`` → ``(groups, affine_groups, codes // affine_groups, code_dim)``."""
        return codes.reshape(self.groups, self.config.affine_groups, -1, self.code_dim)
