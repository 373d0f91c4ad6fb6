"""Straight-through VQ with learned codes, and the synchronised update.

Huh, Cheung, Agrawal, Isola, "Straightening Out the Straight-Through Estimator", arXiv 2305.08842; the plain form is van
den Oord et al., arXiv 1711.00937. In: latents. Out: the nearest codes. State: codes, a parameter for the optimiser.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.quantizers.base import (
    Quantized,
    Quantizer,
    QuantizerOptions,
    ReplacementOptions,
    look_up,
    mean_square,
    straight_through,
)
from pipeline.quantizers.learned import LearnedTable
from pipeline.quantizers.search import nearest_codes

MAXIMUM_NORM = 10.0
"""Longest vector that ``normalise=max_norm`` lets through, as published."""


class StraightThroughOptions(QuantizerOptions, ReplacementOptions):
    """What plain and affine codes have in common."""

    alpha: float = Field(1.0, ge=0, description="weight of the whole quantizer loss")
    beta: float = Field(
        0.95, ge=0, le=1, description="share of the loss that moves codes to latents; the rest moves latents to codes"
    )
    sync_nu: float = Field(0.0, ge=0, description="ν: share of the task's gradient that codes get too; 0: none")
    normalise: Literal["none", "l2", "max_norm"] = Field(
        "none", description=f"latents and codes of each group: to length 1, or to length {MAXIMUM_NORM:g} at most"
    )


class STEConfig(StraightThroughOptions):
    """Straight-through VQ."""

    kind: Literal["ste"] = "ste"


class STEQuantizer(Quantizer):
    """``loss = α·((1 − β)·mean((z − sg(c))²) + β·mean((sg(z) − c)²))``, a mean over tokens and features."""

    config: StraightThroughOptions

    def __init__(self, config: StraightThroughOptions) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups)
        self.code_vectors = LearnedTable(torch.randn(self.groups, self.codes, self.code_dim))

    def effective_codes(self) -> Tensor:
        """The codes as they are compared, looked up and learned: fp32 ``(groups, codes, code_dim)``, with gradient."""
        return self.normalise(self.code_vectors())

    def codebook(self) -> Tensor:
        return self.effective_codes().detach()

    def prepare(self, latents: Tensor) -> Tensor:
        if self.config.normalise == "none":
            return latents
        return self.normalise(self.split_groups(latents)).reshape(-1, self.dim)

    def normalise(self, vectors: Tensor) -> Tensor:
        """Vectors ``(..., code_dim)`` with the length that the configuration asks for."""
        if self.config.normalise == "l2":
            return functional.normalize(vectors, dim=-1)
        if self.config.normalise == "max_norm":
            lengths = vectors.norm(dim=-1, keepdim=True)
            return vectors * (MAXIMUM_NORM / lengths.clamp(min=MAXIMUM_NORM))
        return vectors

    def quantize(self, latents: Tensor) -> Quantized:
        codebook = self.effective_codes()
        codes = nearest_codes(self.split_groups(latents), codebook)
        vectors = look_up(codebook, codes).reshape(-1, self.dim)
        config = self.config
        losses = {
            "commitment": config.alpha * (1 - config.beta) * mean_square(latents - vectors.detach()),
            "codebook": config.alpha * config.beta * mean_square(latents.detach() - vectors),
        }
        passed = straight_through(latents, vectors)
        if config.sync_nu:
            # Codes receive ν times the gradient g of their tokens, so that they step along with the latents:
            # c ← (1 − η)c + ηz − η²g. The paper's equation 21 has + before the last term; this is the right sign.
            passed = passed + config.sync_nu * (vectors - vectors.detach())
        return Quantized(passed, codes, losses)

    def assign(self, latents: Tensor) -> Tensor:
        return nearest_codes(self.split_groups(latents), self.codebook())

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Set the codes so that the effective ones are ``codebook``."""
        self.code_vectors.weight.copy_(self.invert(codebook))

    @torch.no_grad()
    def replace_codes(self, dead: Tensor, vectors: Tensor) -> None:
        weight = self.code_vectors.weight
        weight.copy_(torch.where(dead.unsqueeze(-1), vectors.to(weight.dtype), weight))
        self.idle_steps.masked_fill_(dead, 0)
