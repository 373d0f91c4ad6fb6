"""Smoothed VQ on the simplex, with the regulariser that pulls each vertex's nearest tokens towards it.

Morita, "Pushing Toward the Simplex Vertices", arXiv 2509.22161. In: latents. Out: in training mixtures p·C of the
codes, at inference the likeliest code. State: codes and, for ``logits=linear``, a head; parameters for the optimiser.

No code was published; the squared distance, the means over codes and neighbours and the choice of logits are ours.
"""

from __future__ import annotations

import warnings
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
    look_up,
)
from pipeline.quantizers.entropy import Scope, ScopeWatch, perplexity
from pipeline.quantizers.learned import LearnedTable, LogitWeights
from pipeline.quantizers.search import highest_scores_by_group, nearest_codes
from pipeline.quantizers.simplex import Distance, Neighbourhood, mix


class KNNSimplexConfig(QuantizerOptions, ProjectionOptions, NormaliseOptions):
    """Smoothed VQ with the K-nearest-neighbour regulariser."""

    kind: Literal["knn_simplex"] = "knn_simplex"
    neighbours: int = Field(
        2, ge=1, description="K: tokens that each code pulls; a micro-batch should have K · codes tokens"
    )
    distance: Distance = Field("cross_entropy", description="of a mixture p to vertex m: |e_m − p|² or −log p_m")
    weight: float = Field(0.1, ge=0, description="of the regulariser")
    logits: Literal["dot", "distance", "linear"] = Field(
        "dot",
        description="dot: z·c/√(size of a code), with normalise=l2 the cosine, which wants a temperature well below 1; "
        "distance: −|z − c|²; linear: a head of its own",
    )
    sampler: Literal["softmax", "gumbel"] = Field("softmax", description="how mixtures come from logits in training")
    temperature: float = Field(1.0, gt=0, description="divides the logits")
    scope: Scope = Field(
        "micro_batch",
        description="where neighbours are looked for. global: in the micro-batches that all ranks hold at one time, "
        "which makes results depend on the number of ranks",
    )


class KNNSimplexQuantizer(Quantizer):
    """``loss = weight/(codes·K) · Σ_m Σ_{i ∈ K nearest to vertex m} D(e_m, p_i)``, mean over groups.

    Under ``scope=global`` each rank with tokens has the joint loss, and the gradients weighted by the ranks' tokens sum
    up to the joint one; the ranks exchange the K smallest distances of each code, and in training every rank must call
    ``forward`` equally often. Under gradient accumulation neighbours are those of the micro-batches that ranks hold at
    one time, not of the whole step, which is warned of.
    """

    config: KNNSimplexConfig

    def __init__(self, config: KNNSimplexConfig) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups)
        self.code_vectors = LearnedTable(torch.randn(self.groups, self.codes, self.code_dim))
        if config.logits == "linear":
            self.head = LogitWeights(self.groups, self.codes, self.codebook_dim, std=self.codebook_dim**-0.5)
        # Vectors of length 1 are ranked alike by dot products and by distances.
        self.compares_latents = config.logits == "distance" or (config.logits == "dot" and config.normalise == "l2")
        self._scope = ScopeWatch(config.kind, config.scope)
        self._warned = False

    def codebook(self) -> Tensor:
        return self.normalise(self.code_vectors()).detach()

    def quantize(self, latents: Tensor) -> Quantized:
        config = self.config
        codebook = self.normalise(self.code_vectors())
        compared, weight, bias = self.logits(latents, codebook)
        neighbourhood = Neighbourhood(
            config.neighbours if config.weight else 0,
            config.distance,
            config.scope if self.training else "micro_batch",
            self.process_group,
        )
        noise = 1 / config.temperature if self.training and config.sampler == "gumbel" else 0.0
        mixed = mix(compared, weight / config.temperature, bias / config.temperature, codebook, neighbourhood, noise)
        self._warn_of_few(mixed.total)
        codes = mixed.codes if self.training else self.assign(latents)
        with torch.no_grad():
            hard = look_up(codebook, codes)
            metrics = {
                "soft_hard_gap": (mixed.vectors - hard).square().sum() / max(1, hard.numel()),
                "prob_perplexity": perplexity(mixed.mean).mean(),
            }
        vectors = mixed.vectors if self.training else look_up(codebook, codes)
        return Quantized(vectors.reshape(-1, self.codebook_dim), codes, {"knn": config.weight * mixed.loss}, metrics)

    def logits(self, latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of latents ``(tokens, codebook_dim)`` and effective codes: x ``(tokens, groups, n)``, W
        ``(groups, codes, n)`` and b ``(groups, codes)`` with logits x·Wᵀ + b before the temperature."""
        if self.config.logits == "linear":
            return latents.unsqueeze(1).expand(-1, self.groups, -1), *self.head()
        split = self.split_groups(latents)
        if self.config.logits == "dot":
            scale = 1.0 if self.config.normalise == "l2" else self.code_dim**-0.5
            return split, codebook * scale, codebook.new_zeros(self.groups, self.codes)
        # −|z − c|² but for |z|², which softmax cancels; near the codes' centre, where fp32 keeps the difference
        centre = codebook.detach().mean(dim=1)  # (groups, code_dim)
        centred = codebook - centre.unsqueeze(1)
        return split - centre, 2.0 * centred, -centred.square().sum(dim=-1)

    def assign(self, latents: Tensor) -> Tensor:
        codebook = self.codebook()
        if self.config.logits == "distance":
            return nearest_codes(self.split_groups(latents), codebook)
        return highest_scores_by_group(*self.logits(latents, codebook))

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        self._scope.saw_forward()

    def update(self, statistics: dict[str, Tensor]) -> None:
        self._scope.saw_step()

    def _warn_of_few(self, tokens: int) -> None:
        wanted = self.config.neighbours * self.codes
        if self.training and self.config.weight and 0 < tokens < wanted and not self._warned:
            self._warned = True
            warnings.warn(
                f"knn_simplex got {tokens} tokens for neighbours={self.config.neighbours} × codes={self.codes}: codes "
                f"share tokens and can't all be reached exactly; bring {wanted} tokens, or fewer neighbours or codes",
                stacklevel=2,
            )

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """A linear head gets the logits z·c − |c|²/2, whose largest is the nearest code's."""
        self.code_vectors.weight.copy_(codebook)
        if self.config.logits == "linear":
            weights = torch.zeros(self.groups, self.codes, self.groups, self.code_dim, device=codebook.device)
            for group in range(self.groups):
                weights[group, :, group] = codebook[group]
            self.head.weight.copy_(weights.reshape(-1, self.codebook_dim))
            self.head.bias.copy_(-codebook.square().sum(dim=-1).reshape(-1) / 2)
