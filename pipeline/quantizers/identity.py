"""No quantizer: latents go through unchanged. The continuous pretraining phase (Zhao et al., arXiv 2411.16550)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipeline.quantizers.base import Quantized, Quantizer


class IdentityConfig(BaseModel):
    """Has no codebook, so nothing to choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["identity"] = "identity"
    dim: int | None = Field(None, ge=1, description="size of a latent; none: the model supplies it")


class IdentityQuantizer(Quantizer):
    """Vectors are the latents, every real token's code is 0, there are no losses and no statistics."""

    def __init__(self, config: IdentityConfig) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=0, groups=1)

    def quantize(self, latents: Tensor) -> Quantized:
        return Quantized(latents, self.assign(latents), losses={})

    def assign(self, latents: Tensor) -> Tensor:
        return torch.zeros(latents.shape[0], 1, dtype=torch.int64, device=latents.device)

    def codebook(self) -> Tensor:
        return torch.empty(1, 0, self.dim, device=self.updates.device)

    def decode(self, codes: Tensor) -> Tensor:
        """Raises ValueError: there is nothing to decode from."""
        raise ValueError("quantizer kind identity has no codes to decode: use a kind with a codebook")
