"""Straight-through VQ with learned codes, and the synchronised update.

Huh, Cheung, Agrawal, Isola, "Straightening Out the Straight-Through Estimator", arXiv 2305.08842; the plain form is van
den Oord et al., arXiv 1711.00937. In: latents. Out: the nearest codes. State: codes, a parameter for the optimiser.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.quantizers.base import (
    ProjectionOptions,
    Quantized,
    Quantizer,
    QuantizerOptions,
    ReplacementOptions,
    look_up,
    mean_square,
    straight_through,
    sum_by_code,
)
from pipeline.quantizers.learned import LearnedTable
from pipeline.quantizers.search import nearest_codes

MAXIMUM_NORM = 10.0
"""Longest vector that ``normalise=max_norm`` lets through, as published."""


class StraightThroughOptions(QuantizerOptions, ProjectionOptions, ReplacementOptions):
    """What plain and affine codes have in common."""

    alpha: float = Field(1.0, ge=0, description="weight of the whole quantizer loss")
    beta: float = Field(
        0.95, ge=0, le=1, description="share of the loss that moves codes to latents; the rest moves latents to codes"
    )
    sync_nu: float = Field(0.0, ge=0, description="ν: share of the task's gradient that codes get too; 0: none")
    normalise: Literal["none", "l2", "max_norm"] = Field(
        "none", description=f"latents and codes of each group: to length 1, or to length {MAXIMUM_NORM:g} at most"
    )
    inner_steps: int = Field(
        0,
        ge=0,
        description="alternating optimisation: gradient steps that codes make by themselves towards the latents "
        "assigned to them, once an optimiser step; 0: codes learn together with the model",
    )
    inner_rate: float = Field(
        0.1, gt=0, description="share of the way to its latents' mean that a code in average use goes in an inner step"
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
        if config.inner_steps:
            self.declare_statistic("sums", self.groups, self.codes, self.code_dim)

    def effective_codes(self, raw: Tensor) -> Tensor:
        """The codes as they are compared, looked up and learned, for those that are kept: both fp32
        ``(groups, codes, code_dim)``."""
        return self.normalise(raw)

    def codebook(self) -> Tensor:
        return self.effective_codes(self.code_vectors()).detach()

    def normalise(self, vectors: Tensor) -> Tensor:
        if self.config.normalise == "max_norm":
            lengths = vectors.norm(dim=-1, keepdim=True)
            return vectors * (MAXIMUM_NORM / lengths.clamp(min=MAXIMUM_NORM))
        return super().normalise(vectors)

    def quantize(self, latents: Tensor) -> Quantized:
        config = self.config
        raw = self.code_vectors()
        codebook = self.effective_codes(raw)
        codes = nearest_codes(self.split_groups(latents), codebook)
        vectors = look_up(codebook, codes).reshape(-1, self.codebook_dim)
        # Codes that make inner steps leave this loss to what is learned beside them: the affine map, if any.
        learning = look_up(self.effective_codes(raw.detach()), codes) if config.inner_steps else vectors
        losses = {
            "commitment": config.alpha * (1 - config.beta) * mean_square(latents - vectors.detach()),
            "codebook": config.alpha * config.beta * mean_square(latents.detach() - learning.reshape(vectors.shape)),
        }
        passed = straight_through(latents, vectors)
        if config.sync_nu:
            # Codes receive ν times the gradient g of their tokens, so that they step along with the latents:
            # c ← (1 − η)c + ηz − η²g. The paper's equation 21 has + before the last term; this is the right sign.
            passed = passed + config.sync_nu * (vectors - vectors.detach())
        return Quantized(passed, codes, losses)

    def assign(self, latents: Tensor) -> Tensor:
        return nearest_codes(self.split_groups(latents), self.codebook())

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        if self.config.inner_steps:
            self.add_statistic("sums", sum_by_code(self.split_groups(latents), codes, self.codes))

    def moved_codes(self, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Section 5.4: n steps of gradient descent on mean((c − z)²) with the step's assignments held, in closed form.

        A step goes ρ_k = 2·lr·n_k / (tokens·dim) of the way to the mean of the latents of code k; with ``inner_rate``
        r, lr = r·codes·dim / 2, so that ρ_k = r where n_k = tokens / codes. At most the whole way.
        """
        if not self.config.inner_steps:
            return None
        counts = statistics["usage"]  # (groups, codes)
        used = counts > 0
        if not bool(used.any()):
            return None
        share = self.config.inner_rate * self.codes * counts / counts.sum(dim=1, keepdim=True)
        left = (1 - share.clamp(max=1)).pow(self.config.inner_steps).unsqueeze(-1)
        codes, means = self.codebook(), statistics["sums"] / counts.clamp(min=1).unsqueeze(-1)
        return used, self.invert(means + left * (codes - means))

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Set the codes so that the effective ones are ``codebook``."""
        self.code_vectors.weight.copy_(self.invert(codebook))

    @torch.no_grad()
    def replace_codes(self, chosen: Tensor, vectors: Tensor) -> None:
        weight = self.code_vectors.weight
        weight.copy_(torch.where(chosen.unsqueeze(-1), vectors.to(weight.dtype), weight))
