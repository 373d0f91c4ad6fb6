"""Lookup-free quantization: a code is the signs of a latent's features; the entropy of codes is what is trained.

Yu et al., "Language Model Beats Diffusion", arXiv 2310.05737, section 3; ``spherical`` is the binary spherical
quantization of Zhao et al., arXiv 2406.07548. In: latents. Out: signs. State: none but the learned maps to the bits and
back, where latents have another size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn import functional

from pipeline.quantizers.base import Quantized, Quantizer, mean_square, straight_through
from pipeline.quantizers.entropy import Scope, ScopeWatch, joint_mean

SMALLEST_PROBABILITY = 1e-20
"""Keeps log(0) out of an entropy and out of its gradient."""


class LFQConfig(BaseModel):
    """Lookup-free quantization."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["lfq"] = "lfq"
    dim: int | None = Field(None, ge=1, description="size of a quantized vector; none: the model supplies it")
    codes: int = Field(512, ge=2, description="codes of each group: a power of 2, one bit a feature")
    groups: int = Field(1, ge=1, description="sign codes that a vector is joined from")
    spherical: bool = Field(False, description="latents of length 1 and signs / √bits: binary spherical quantization")
    entropy_weight: float = Field(
        0.1, ge=0, description="weight of the loss that asks for sure tokens and evenly used codes"
    )
    diversity_gamma: float = Field(1.0, ge=0, description="γ: share of even use in that loss")
    inverse_temperature: float = Field(100.0, gt=0, description="how sharply the loss takes a latent for its code")
    commitment: float = Field(0.0, ge=0, description="weight of the latents' pull towards their codes")
    scope: Scope = Field(
        "micro_batch",
        description="tokens whose codes shall be evenly used: one micro-batch's; global: those of the micro-batches "
        "that all ranks hold at one time, which under accumulation depends on their number",
    )

    @model_validator(mode="after")
    def _codes_are_bits(self) -> Any:
        if self.codes & (self.codes - 1):
            bits = self.codes.bit_length()
            raise ValueError(f"codes={self.codes} is no power of 2: use codes={2 ** (bits - 1)} or {2**bits}")
        return self


class LFQQuantizer(Quantizer):
    """``loss = entropy_weight · (E H(p) − γ·H(E p)) + commitment · mean((sg(c) − z)²)``, a mean over groups, with
    p = softmax(2·inverse_temperature·z·c) over all codes c.

    A feature of exactly 0 counts as −1, as in the paper. The first feature is the most significant bit of the code.
    """

    config: LFQConfig

    def __init__(self, config: LFQConfig) -> None:
        assert config.dim is not None
        self.bits = config.codes.bit_length() - 1
        super().__init__(
            config,
            dim=config.dim,
            codes=config.codes,
            groups=config.groups,
            codebook_dim=config.groups * self.bits,
        )
        self.value = self.bits**-0.5 if config.spherical else 1.0
        self._scope = ScopeWatch(config.kind, config.scope)

    def prepare(self, latents: Tensor) -> Tensor:
        if not self.config.spherical:
            return latents
        return functional.normalize(self.split_groups(latents), dim=-1).reshape(-1, self.codebook_dim)

    def quantize(self, latents: Tensor) -> Quantized:
        config = self.config
        ones = latents.detach() > 0
        signs = self.value * (2.0 * ones - 1.0)
        scope = config.scope if self.training else "micro_batch"  # ranks may evaluate unequally often
        of_token, of_mean = self.entropies(latents, scope)
        losses = {
            "entropy": config.entropy_weight * (of_token - config.diversity_gamma * of_mean).mean(),
            "commitment": config.commitment * mean_square(signs - latents),
        }
        metrics = {"token_entropy": of_token.detach().mean(), "prob_perplexity": of_mean.detach().exp().mean()}
        return Quantized(straight_through(latents, signs), self._join(ones), losses, metrics)

    def entropies(self, latents: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """E H(p) and H(E p) in nats, both ``(groups,)``, of latents ``(tokens, codebook_dim)``; 0 for no tokens.

        Over ± codes p is a product of independent bits: its entropy is the sum of theirs, and its mean over tokens is
        the product AᵀB / tokens of the distributions of the first and the second half of the bits, exactly. Nothing
        has the size of tokens × codes.
        """
        tokens = len(latents)
        logits = 4 * self.config.inverse_temperature * self.value * self.split_groups(latents)  # log p(+1)/p(−1)
        sure, unsure = torch.sigmoid(logits), torch.sigmoid(-logits)
        of_bits = sure * functional.softplus(-logits) + unsure * functional.softplus(logits)
        of_token = of_bits.sum(dim=(0, 2)) / max(1, tokens)
        first, second = (self._distribution(part) for part in logits.tensor_split([-(-self.bits // 2)], dim=-1))
        sums = torch.einsum("tga,tgb->gab", first, second).reshape(self.groups, self.codes)
        mean = joint_mean(sums, tokens, scope, self.process_group)
        of_mean = -(mean * mean.clamp(min=SMALLEST_PROBABILITY).log()).sum(dim=-1)
        return of_token, of_mean if tokens else sums.sum(dim=-1)

    def assign(self, latents: Tensor) -> Tensor:
        return self._join(latents > 0)

    def codebook(self) -> Tensor:
        codes = torch.arange(self.codes, device=self.updates.device).unsqueeze(1)
        return self.vectors_of(codes).transpose(0, 1).expand(self.groups, -1, -1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        bits = codes.unsqueeze(-1) // self._weights() % 2
        return self.value * (2.0 * bits - 1.0)

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        self._scope.saw_forward()

    def update(self, statistics: dict[str, Tensor]) -> None:
        self._scope.saw_step()

    def _distribution(self, logits: Tensor) -> Tensor:
        """Of bits ``(tokens, groups, n)``, each by the log ratio of its two values, over their 2ⁿ joint values."""
        bits = logits.shape[-1]
        values = torch.arange(2**bits, device=logits.device).unsqueeze(1)
        ones = (values // (2 ** torch.arange(bits - 1, -1, -1, device=logits.device)) % 2).float()
        # −log p: small terms for what is likely, where a softmax of signs · logits has differences of large ones.
        surprise = functional.softplus(-logits) @ ones.T + functional.softplus(logits) @ (1 - ones).T
        return torch.exp(-surprise)

    def _join(self, ones: Tensor) -> Tensor:
        """bool ``(tokens, codebook_dim)`` → int64 ``(tokens, groups)``."""
        return (ones.reshape(-1, self.groups, self.bits).long() * self._weights()).sum(dim=-1)

    def _weights(self) -> Tensor:
        return 2 ** torch.arange(self.bits - 1, -1, -1, device=self.updates.device)
