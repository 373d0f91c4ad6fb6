"""The rotation trick: EMA-VQ whose gradient is turned and scaled from the code to the latent instead of copied.

Fifty et al., "Restructuring Vector Quantization with the Rotation Trick", arXiv 2410.06424, section 4. In: latents.
Out: the nearest codes. State: EMA-VQ's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.quantizers.base import Quantized, ReplacementOptions, look_up, mean_square
from pipeline.quantizers.ema import EMAQuantizer, MovingAverageOptions

SHORTEST = 1e-6
"""A latent shorter than this has no direction: its gradient is copied, as the straight-through estimator does."""


class RotationConfig(MovingAverageOptions, ReplacementOptions):
    """EMA-VQ with the rotation trick."""

    kind: Literal["rotation"] = "rotation"


class RotationQuantizer(EMAQuantizer):
    """EMA-VQ with :func:`rotate_to_codes` in the place of the straight-through estimator, each group by itself."""

    config: RotationConfig

    def quantize(self, latents: Tensor) -> Quantized:
        codes = self.assign(latents)
        chosen = look_up(self.code_vectors, codes)  # (tokens, groups, code_dim)
        vectors = rotate_to_codes(self.split_groups(latents), chosen).reshape(-1, self.codebook_dim)
        commitment = self.config.commitment * mean_square(chosen.reshape(-1, self.codebook_dim) - latents)
        return Quantized(vectors, codes, {"commitment": commitment})


def rotate_to_codes(latents: Tensor, codes: Tensor) -> Tensor:
    """The value of ``codes`` bit for bit, with the gradient of (|c| / |z|)·R·z for ``latents``, R and the ratio held.

    Both ``(..., code_dim)``. R is the rotation that turns z to c in their plane. A code of length 0 passes no gradient.
    """
    return _Rotation.apply(latents, codes)  # type: ignore[no-untyped-call, no-any-return]


class _Rotation(torch.autograd.Function):
    """R = I − 2rrᵀ + 2ĉẑᵀ with r = (ẑ + ĉ) / |ẑ + ĉ|; its transpose is applied in sums and products of vectors."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(latents, codes)
        return codes.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        latents, codes = ctx.saved_tensors
        length = latents.norm(dim=-1, keepdim=True)
        direction, code_direction = latents / length.clamp(min=SHORTEST), functional.normalize(codes, dim=-1)
        # Of opposite directions the sum is 0, and so is r: R is then the reflection that takes one to the other.
        between = functional.normalize(direction + code_direction, dim=-1)
        turned = gradient - 2 * between * _dot(between, gradient) + 2 * direction * _dot(code_direction, gradient)
        turned = turned * (codes.norm(dim=-1, keepdim=True) / length.clamp(min=SHORTEST))
        return torch.where(length < SHORTEST, gradient, turned), None


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=-1, keepdim=True)
