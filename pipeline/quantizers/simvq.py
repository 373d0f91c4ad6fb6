"""SimVQ: codes are one learned linear map of vectors that never change, so that all of them move with every token.

Zhu et al., "Addressing Representation Collapse in Vector Quantized Models with One Linear Layer", arXiv 2411.02038.
In: latents. Out: the nearest of the codes C·Wᵀ + b. State: C, frozen; W and b, parameters for the optimiser.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.quantizers.base import (
    NormaliseOptions,
    ProjectionOptions,
    Quantized,
    Quantizer,
    QuantizerOptions,
    look_up,
    mean_square,
    straight_through,
)
from pipeline.quantizers.learned import LinearMap
from pipeline.quantizers.search import nearest_codes


class SimVQConfig(QuantizerOptions, ProjectionOptions, NormaliseOptions):
    """SimVQ."""

    kind: Literal["simvq"] = "simvq"
    codebook_weight: float = Field(1.0, ge=0, description="weight of the codes' pull towards their latents")
    commitment: float = Field(0.25, ge=0, description="weight of the latents' pull towards their codes")


class SimVQQuantizer(Quantizer):
    """``loss = codebook_weight · mean((c − sg(z))²) + commitment · mean((sg(c) − z)²)`` with c of C·Wᵀ + b.

    C is drawn from N(0, 1/code_dim), so that its vectors are about 1 long. Its map starts as the published code's, W
    from U(±code_dim^−½); b, which that code has and the paper's formula has not, starts at 0. Nothing can set or
    replace a code by itself, since all share the map.
    """

    config: SimVQConfig
    frozen_codes: Tensor

    def __init__(self, config: SimVQConfig) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups)
        scale = self.code_dim**-0.5
        frozen = torch.randn(self.groups, self.codes, self.code_dim, dtype=torch.float32) * scale
        self.register_buffer("frozen_codes", frozen)
        starts = torch.empty(self.groups, self.code_dim, self.code_dim).uniform_(-scale, scale)
        self.maps = nn.ModuleList(LinearMap(start) for start in starts)  # one a group

    def effective_codes(self) -> Tensor:
        """The codes as they are compared, looked up and learned: fp32 ``(groups, codes, code_dim)``."""
        mapped = [map_codes(codes) for map_codes, codes in zip(self.maps, self.frozen_codes, strict=True)]
        return self.normalise(torch.stack(mapped))

    def codebook(self) -> Tensor:
        return self.effective_codes().detach()

    def quantize(self, latents: Tensor) -> Quantized:
        codebook = self.effective_codes()
        codes = nearest_codes(self.split_groups(latents), codebook)
        vectors = look_up(codebook, codes).reshape(-1, self.codebook_dim)
        losses = {
            "codebook": self.config.codebook_weight * mean_square(vectors - latents.detach()),
            "commitment": self.config.commitment * mean_square(vectors.detach() - latents),
        }
        return Quantized(straight_through(latents, vectors), codes, losses)

    def assign(self, latents: Tensor) -> Tensor:
        return nearest_codes(self.split_groups(latents), self.codebook())
