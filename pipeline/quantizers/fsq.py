"""Finite scalar quantization: each feature of a bounded latent is rounded to one of a few levels; no code is learned.

Mentzer et al., arXiv 2309.15505, section 3. In: latents. Out: the nearest points of a fixed grid in [−1, 1]. State:
none but the learned maps to the grid's features and back, where latents have another size.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from pipeline.quantizers.base import Quantized, Quantizer, straight_through

PUBLISHED_LEVELS = {
    2**8: (8, 6, 5),
    2**10: (8, 5, 5, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
"""The paper's levels for a codebook of about so many codes (its table 1)."""
ROOM = 1e-3
"""How much further than half a level beyond the outermost ones latents can get, as published."""


class FSQConfig(BaseModel):
    """Finite scalar quantization."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["fsq"] = "fsq"
    dim: int | None = Field(None, ge=1, description="size of a quantized vector; none: the model supplies it")
    levels: tuple[int, ...] = Field((8, 5, 5, 5), description="values of each feature; none: the paper's for codes")
    codes: int = Field(1000, description="product of levels; without levels: a size the paper has levels for")
    groups: int = Field(1, ge=1, description="grids that a vector is joined from")

    @model_validator(mode="before")
    @classmethod
    def _levels_and_codes(cls, values: Any) -> Any:
        """Each is worked out from the other where only one is given."""
        if not isinstance(values, dict):
            return values
        levels, codes = values.get("levels"), values.get("codes")
        if levels is None:
            sizes = {math.prod(levels): levels for levels in PUBLISHED_LEVELS.values()} | PUBLISHED_LEVELS
            if codes is not None and codes not in sizes:
                known = ", ".join(map(str, PUBLISHED_LEVELS))
                raise ValueError(f"codes={codes} has no published levels: use codes={known}, or give levels")
            levels, codes = sizes[codes or 2**10], None
        product = math.prod(levels) if _are_integers(levels) else codes
        return values | {"levels": levels, "codes": product if codes is None else codes}

    @model_validator(mode="after")
    def _levels_make_codes(self) -> Any:
        if not self.levels or min(self.levels) < 3:
            raise ValueError(
                f"levels={list(self.levels)}: use 3 values a feature or more, such as [8, 5, 5, 5], or kind=lfq for 2"
            )
        if self.codes != math.prod(self.levels):
            raise ValueError(
                f"codes={self.codes} is not the {math.prod(self.levels)} of levels={list(self.levels)}: "
                f"use codes={math.prod(self.levels)}, or leave it out"
            )
        return self


def _are_integers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, int) for value in values)


class FSQQuantizer(Quantizer):
    """``ẑ = round(tanh(z + s)·h − o) / ⌊L/2⌋`` by feature, with h = (L − 1)(1 + ε)/2, o = ½ for an even L and 0 for an
    odd one, and s = atanh(o/h), which puts z = 0 on a level. The gradient passes the rounding unchanged.

    Code i has feature j on level ``i // (L_0 ⋯ L_{j−1}) mod L_j``: the first feature runs fastest. What is compared
    with codes, and what ``real_latents`` gives, is the bounded latent.
    """

    config: FSQConfig
    levels: Tensor

    def __init__(self, config: FSQConfig) -> None:
        assert config.dim is not None
        codebook_dim = config.groups * len(config.levels)
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.groups, codebook_dim=codebook_dim)
        self.register_buffer("levels", torch.tensor(config.levels), persistent=False)

    def prepare(self, latents: Tensor) -> Tensor:
        half = (self.levels - 1) * (1 + ROOM) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(self.split_groups(latents) + torch.atanh(offset / half)) * half - offset
        return (bounded / (self.levels // 2)).reshape(-1, self.codebook_dim)

    def quantize(self, latents: Tensor) -> Quantized:
        places = self._places(latents)
        values = self._values(places).reshape(-1, self.codebook_dim)
        return Quantized(straight_through(latents, values), self._join(places), losses={})

    def assign(self, latents: Tensor) -> Tensor:
        return self._join(self._places(latents))

    def codebook(self) -> Tensor:
        codes = torch.arange(self.codes, device=self.levels.device).unsqueeze(1)
        return self.vectors_of(codes).transpose(0, 1).expand(self.groups, -1, -1)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self._values(codes.unsqueeze(-1) // self._strides() % self.levels)

    def _places(self, bounded: Tensor) -> Tensor:
        """Level of each feature, counted from 0: ``(tokens, codebook_dim)`` → int64 ``(tokens, groups, features)``."""
        half = self.levels // 2
        places = (self.split_groups(bounded.detach()) * half).round().long() + half
        # From 1001 levels on, ROOM is more than half a level.
        return torch.minimum(places.clamp(min=0), self.levels - 1)

    def _values(self, places: Tensor) -> Tensor:
        half = self.levels // 2
        return (places - half).float() / half

    def _join(self, places: Tensor) -> Tensor:
        return (places * self._strides()).sum(dim=-1)

    def _strides(self) -> Tensor:
        return torch.cat([self.levels.new_ones(1), self.levels.cumprod(dim=0)[:-1]])
