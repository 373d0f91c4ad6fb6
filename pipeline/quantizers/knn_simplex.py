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
from torch.nn import functional

from pipeline import collectives
from pipeline.quantizers.base import Quantized, Quantizer, QuantizerOptions, look_up
from pipeline.quantizers.gumbel import gumbel_noise, perplexity_of_mean
from pipeline.quantizers.learned import LearnedTable, LinearHead
from pipeline.quantizers.search import highest_scores, nearest_codes


class KNNSimplexConfig(QuantizerOptions):
    """Smoothed VQ with the K-nearest-neighbour regulariser."""

    kind: Literal["knn_simplex"] = "knn_simplex"
    neighbours: int = Field(
        2, ge=1, description="K: tokens that each code pulls; a micro-batch should have K · codes tokens"
    )
    distance: Literal["l2", "cross_entropy"] = Field(
        "cross_entropy", description="of a mixture p to vertex m: |e_m − p|² or −log p_m"
    )
    weight: float = Field(0.1, ge=0, description="of the regulariser")
    logits: Literal["dot", "distance", "linear"] = Field(
        "dot", description="dot: z·c/√dim; distance: −|z − c|²; linear: a head of its own"
    )
    sampler: Literal["softmax", "gumbel"] = Field("softmax", description="how mixtures come from logits in training")
    temperature: float = Field(1.0, gt=0, description="divides the logits")
    scope: Literal["micro_batch", "global"] = Field(
        "micro_batch",
        description="where neighbours are looked for. global: in the micro-batches that all ranks hold at one time, "
        "which makes results depend on the number of ranks",
    )


class KNNSimplexQuantizer(Quantizer):
    """``loss = weight/(codes·K) · Σ_m Σ_{i ∈ K nearest to vertex m} D(e_m, p_i)``, mean over groups.

    Under ``scope=global`` the loss of a rank is its share of the joint loss, scaled so that the token-weighted mean
    over ranks is the joint loss; the ranks exchange the K smallest distances of each code, and in training every rank
    must call ``forward`` equally often.
    """

    config: KNNSimplexConfig

    def __init__(self, config: KNNSimplexConfig) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups)
        self.code_vectors = LearnedTable(torch.randn(self.groups, self.codes, self.code_dim))
        if config.logits == "linear":
            self.head = LinearHead(self.dim, self.groups, self.codes, std=self.dim**-0.5)
        self._warned = False

    def codebook(self) -> Tensor:
        return self.code_vectors().detach()

    def quantize(self, latents: Tensor) -> Quantized:
        codebook = self.code_vectors()
        logits = self.score(latents, codebook) / self.config.temperature
        if self.training and self.config.sampler == "gumbel":
            logits = logits + gumbel_noise(logits) / self.config.temperature
        log_mixtures = functional.log_softmax(logits, dim=-1)  # (tokens, groups, codes)
        mixtures = log_mixtures.exp()
        losses = {"knn": self.config.weight * self.regularise(log_mixtures, mixtures)}

        if self.training:
            codes = log_mixtures.argmax(dim=-1)
            vectors = torch.einsum("tgk,gkd->tgd", mixtures, codebook)
        else:
            codes = self.assign(latents)
            vectors = look_up(codebook, codes)
        with torch.no_grad():
            hard = look_up(codebook, codes)
            soft = torch.einsum("tgk,gkd->tgd", mixtures, codebook)
            metrics = {
                "soft_hard_gap": (soft - hard).square().sum() / max(1, soft.numel()),
                "prob_perplexity": perplexity_of_mean(mixtures).mean(),
            }
        return Quantized(vectors.reshape(-1, self.dim), codes, losses, metrics)

    def score(self, latents: Tensor, codebook: Tensor) -> Tensor:
        """Logits before the temperature: ``(tokens, groups, codes)``."""
        if self.config.logits == "linear":
            return self.head(latents)
        split = self.split_groups(latents)
        if self.config.logits == "dot":
            return torch.einsum("tgd,gkd->tgk", split, codebook) / self.code_dim**0.5
        # −|z − c|² but for |z|², which softmax cancels; near the codes' centre, where fp32 keeps the difference
        centre = codebook.detach().mean(dim=1, keepdim=True)  # (groups, 1, code_dim)
        centred = codebook - centre
        products = torch.einsum("tgd,gkd->tgk", split - centre.squeeze(1), centred)
        return 2.0 * products - centred.square().sum(dim=-1)

    def assign(self, latents: Tensor) -> Tensor:
        if self.config.logits == "linear":
            return self.head.likeliest(latents)
        split, codebook = self.split_groups(latents), self.codebook()
        if self.config.logits == "distance":
            return nearest_codes(split, codebook)
        none = codebook.new_zeros(self.codes)
        return torch.stack([highest_scores(split[:, g], codebook[g], none) for g in range(self.groups)], dim=1)

    def regularise(self, log_mixtures: Tensor, mixtures: Tensor) -> Tensor:
        """The regulariser without its weight, from p and log p, both ``(tokens, groups, codes)``."""
        distances = self._distances(log_mixtures, mixtures)  # (groups, codes, tokens)
        tokens = distances.shape[-1]
        if self.config.scope == "global" and self.training:
            return self._share_of_global(distances)
        self._warn_of_few(tokens)
        if not tokens:
            return distances.sum()
        return torch.topk(distances, min(self.config.neighbours, tokens), dim=-1, largest=False).values.mean()

    def _distances(self, log_mixtures: Tensor, mixtures: Tensor) -> Tensor:
        """D(e_m, p_i): ``(groups, codes, tokens)``."""
        if self.config.distance == "cross_entropy":
            distances = -log_mixtures
        else:
            distances = 1.0 - 2.0 * mixtures + mixtures.square().sum(dim=-1, keepdim=True)
        return distances.permute(1, 2, 0)

    def _share_of_global(self, distances: Tensor) -> Tensor:
        """This rank's share of the loss over all ranks' tokens: the K smallest of all are among each rank's K smallest.

        Ties go to the lower rank, then to the earlier token.
        """
        tokens, neighbours = distances.shape[-1], self.config.neighbours
        local = torch.topk(distances, min(neighbours, tokens), dim=-1, largest=False).values
        values = functional.pad(local.detach(), (0, neighbours - local.shape[-1]), value=torch.inf)
        count = torch.tensor([float(tokens)], device=values.device)
        gathered = collectives.all_gather(torch.cat([count, values.reshape(-1)]), self.process_group)
        total = int(gathered[:, 0].sum())
        self._warn_of_few(total)
        if not tokens:
            return distances.sum()
        by_rank = gathered[:, 1:].reshape(-1, *values.shape).permute(1, 2, 0, 3).flatten(2)  # (groups, codes, W·K)
        chosen = torch.zeros_like(by_rank, dtype=torch.bool)
        best = by_rank.sort(dim=-1, stable=True).indices[..., : min(neighbours, total)]
        chosen.scatter_(-1, best, True)
        first = collectives.rank(self.process_group) * neighbours
        mine = chosen[..., first : first + local.shape[-1]]
        joint = (local * mine).sum() / (self.groups * self.codes * min(neighbours, total))
        return joint * (total / tokens)

    def _warn_of_few(self, tokens: int) -> None:
        wanted = self.config.neighbours * self.codes
        if self.training and 0 < tokens < wanted and not self._warned:
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
            self.head.weight.copy_(weights.reshape(-1, self.dim))
            self.head.bias.copy_(-codebook.square().sum(dim=-1).reshape(-1) / 2)
