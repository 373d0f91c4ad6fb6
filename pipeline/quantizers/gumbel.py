"""The product quantizer of wav2vec 2.0: hard Gumbel softmax over several codebooks, with the diversity loss.

Baevski et al., arXiv 2006.11477, in the form fairseq trains (its diversity loss is one of perplexities, the paper's is
one of entropies). In: latents. Out: one code of each group, joined. State: a linear head and codes, parameters; the
temperature falls with the number of optimiser steps.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.quantizers.base import Quantized, Quantizer, QuantizerOptions, look_up
from pipeline.quantizers.entropy import Scope, ScopeWatch, joint_mean, perplexity
from pipeline.quantizers.gumbel_softmax import draw
from pipeline.quantizers.learned import LearnedTable, LogitWeights
from pipeline.quantizers.search import highest_scores_by_group


class GumbelConfig(QuantizerOptions):
    """wav2vec 2.0's quantizer; its published size is groups=2, codes=320."""

    kind: Literal["gumbel"] = "gumbel"
    codes: int = Field(320, ge=2, description="codes in each group's codebook")
    groups: int = Field(2, ge=1, description="codebooks that a vector is joined from")
    input_dim: int | None = Field(None, ge=1, description="size of a latent; none: dim")
    temperature: tuple[float, float, float] = Field(
        (2.0, 0.5, 0.999995), description="at the start, at the end, and the factor of each optimiser step"
    )
    diversity_weight: float = Field(0.1, ge=0, description="weight of the loss that asks for even use of codes")
    scope: Scope = Field(
        "micro_batch",
        description="where the use of codes is to be even. global: over the micro-batches that all ranks hold at one "
        "time, which makes results depend on the number of ranks",
    )

    @model_validator(mode="after")
    def _temperature_falls(self) -> Any:
        start, end, factor = self.temperature
        if not (start >= end > 0 and 0 < factor <= 1):
            raise ValueError(
                f"temperature={list(self.temperature)} does not fall: use [start, end, factor] with start ≥ end > 0 "
                "and a factor above 0, at most 1, such as [2.0, 0.5, 0.999995]"
            )
        return self


class GumbelQuantizer(Quantizer):
    """``loss = diversity_weight · (G·V − Σ_g exp H(p̄_g)) / (G·V)``, p̄ the mean softmax over a micro-batch's tokens.

    Under ``scope=global`` p̄ is over what all ranks hold at one time: each rank with tokens has the joint loss, and the
    gradients weighted by the ranks' tokens sum up to the joint one. It costs one all-reduce of G·V numbers a forward,
    and in training every rank must call ``forward`` equally often.
    """

    config: GumbelConfig
    compares_latents = False

    def __init__(self, config: GumbelConfig) -> None:
        assert config.dim is not None
        input_dim = config.input_dim or config.dim
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups, input_dim=input_dim)
        self.head = LogitWeights(self.groups, self.codes, input_dim, std=1.0)
        self.code_vectors = LearnedTable(torch.rand(self.groups, self.codes, self.code_dim))
        self._scope = ScopeWatch(config.kind, config.scope)

    def temperature(self) -> Tensor:
        """Of the next forward: fp32 scalar, max(start · factor^steps, end)."""
        start, end, factor = self.config.temperature
        # float64 on the device: no wait for a GPU, and 0.999995 to the power of a million steps keeps its digits.
        return (start * torch.pow(factor, self.updates.double())).clamp(min=end).float()

    def codebook(self) -> Tensor:
        return self.code_vectors().detach()

    def quantize(self, latents: Tensor) -> Quantized:
        weight, bias = self.head()
        codebook = self.code_vectors()
        temperature = self.temperature()
        if self.training:
            vectors, sums, codes = draw(self._for_each_group(latents), weight, bias, codebook, temperature)
        else:
            codes = self.assign(latents)
            vectors = look_up(codebook, codes)
            logits = torch.einsum("td,gkd->tgk", latents, weight) + bias
            sums = logits.softmax(dim=-1).sum(dim=0)
        scope = self.config.scope if self.training else "micro_batch"  # ranks may evaluate unequally often
        perplexities = perplexity(joint_mean(sums, len(latents), scope, self.process_group))
        places = self.groups * self.codes
        if len(latents):
            diversity = (places - perplexities.sum()) / places
        else:
            diversity = sums.sum()  # 0, with its graph intact
        metrics = {"temperature": temperature, "prob_perplexity": perplexities.detach().mean()}
        losses = {"diversity": self.config.diversity_weight * diversity}
        return Quantized(vectors.reshape(-1, self.dim), codes, losses, metrics)

    def assign(self, latents: Tensor) -> Tensor:
        return highest_scores_by_group(self._for_each_group(latents), *self.head())

    def _for_each_group(self, latents: Tensor) -> Tensor:
        """``(tokens, input_dim)`` → ``(tokens, groups, input_dim)``, without a copy."""
        return latents.unsqueeze(1).expand(-1, self.groups, -1)

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        self._scope.saw_forward()

    def update(self, statistics: dict[str, Tensor]) -> None:
        self._scope.saw_step()
