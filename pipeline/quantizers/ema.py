"""EMA-VQ: codes are moving averages of the latents assigned to them; no gradient reaches the codebook.

Van den Oord et al., arXiv 1711.00937, appendix A.1; in the exact form of Irie et al., arXiv 2302.07950, of which it is
the special case without a neighbourhood. In: latents. Out: the nearest codes. State: codes, sums and counts in fp32.
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
    QuantizerOptions,
    ReplacementOptions,
    add_by_code,
)
from pipeline.quantizers.commitment import commit
from pipeline.quantizers.search import nearest_codes


class MovingAverageOptions(QuantizerOptions, ProjectionOptions, NormaliseOptions):
    """What EMA-VQ and the Kohonen map have in common."""

    decay: float = Field(0.99, ge=0, lt=1, description="share of the old sums and counts that a step keeps")
    epsilon: float = Field(1e-5, gt=0, description="Laplace smoothing of the counts (update_empty only)")
    count_init: float = Field(
        1.0, ge=0, description="counts at the start; 0 with update_empty lets codes run away that nothing chose"
    )
    update_empty: bool = Field(
        True,
        description="decay codes that nothing chose too, as published, which draws them to the origin after some "
        "7 / (1 - decay) steps without a token; false: they keep their state",
    )
    commitment: float = Field(0.25, ge=0, description="weight of the latents' pull towards their codes")


class EMAConfig(MovingAverageOptions, ReplacementOptions):
    """EMA-VQ."""

    kind: Literal["ema"] = "ema"


class EMAQuantizer(Quantizer):
    """``loss = commitment · mean((sg(c) − z)²)``; codes move in :meth:`update` only."""

    config: MovingAverageOptions
    code_vectors: Tensor
    code_sums: Tensor
    code_counts: Tensor

    def __init__(self, config: MovingAverageOptions) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups)
        shape = (self.groups, self.codes, self.code_dim)
        codes = self.normalise(torch.randn(shape, dtype=torch.float32))
        self.register_buffer("code_vectors", codes)
        # A copy of the codes, not codes · count_init: the published initialisation (section 1.1 of the code read).
        self.register_buffer("code_sums", codes.clone())
        self.register_buffer("code_counts", torch.full(shape[:2], config.count_init, dtype=torch.float32))
        self.declare_statistic("sums", *shape)

    def quantize(self, latents: Tensor) -> Quantized:
        codes = self.assign(latents)
        vectors, distance = commit(latents, self.code_vectors, codes)
        return Quantized(vectors, codes, {"commitment": self.config.commitment * distance})

    def assign(self, latents: Tensor) -> Tensor:
        return nearest_codes(self.split_groups(latents), self.code_vectors)

    def codebook(self) -> Tensor:
        return self.code_vectors.detach()

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        add_by_code(self.pending_statistic("sums"), self.split_groups(latents), codes)

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Irie et al., equations 3–5 with their neighbourhood A(t): n = Aᵀ counts, S = Aᵀ sums, then the averages."""
        counts, sums = statistics["usage"], statistics["sums"]
        if not float(counts.sum()):
            return  # no real token on any rank: there is nothing to average
        if self.config.update_empty:
            self.average(counts, sums)
            total = self.code_counts.sum(dim=1, keepdim=True)
            epsilon = self.config.epsilon
            self.code_counts.add_(epsilon).div_(total + self.codes * epsilon).mul_(total)
            self.divide()
            return
        missed = self.spread(counts.unsqueeze(-1)).squeeze(-1) <= 0
        before = [(state, state[missed]) for state in (self.code_counts, self.code_sums, self.code_vectors)]
        self.average(counts, sums)
        self.divide()
        for state, values in before:
            state[missed] = values

    def average(self, counts: Tensor, sums: Tensor) -> None:
        """Let the moving averages take a step's counts ``(groups, codes)`` and sums ``(groups, codes, code_dim)``."""
        self.code_counts.lerp_(counts, 1 - self.config.decay)
        self.code_sums.lerp_(sums, 1 - self.config.decay)

    def divide(self) -> None:
        """Codes from their sums and counts."""
        torch.div(self.code_sums, self.code_counts.unsqueeze(-1), out=self.code_vectors)
        if self.config.normalise != "none":
            self.code_vectors.copy_(self.normalise(self.code_vectors))

    def spread(self, statistics: Tensor) -> Tensor:
        """Share each code's statistics ``(groups, codes, n)`` with its neighbours; here there are none."""
        return statistics

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Counts of at least 1, and sums that fit them, so that the first step moves no code by more than its due."""
        self.code_vectors.copy_(self.normalise(codebook))
        self.code_counts.fill_(1.0)
        if counts is not None:
            self.code_counts.copy_(counts.clamp(min=1))
        self.code_sums.copy_(self.code_vectors * self.code_counts.unsqueeze(-1))

    @torch.no_grad()
    def replace_codes(self, chosen: Tensor, vectors: Tensor) -> None:
        """A count of 1: the code is young, and its next tokens may move it far."""
        vectors = self.normalise(vectors)
        self.code_counts.masked_fill_(chosen, 1.0)
        for state in (self.code_vectors, self.code_sums):
            state.copy_(torch.where(chosen.unsqueeze(-1), vectors, state))
