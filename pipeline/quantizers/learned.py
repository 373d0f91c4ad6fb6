"""Parameters of learned quantizers, each read through a forward of its own.

An engine that partitions parameters (DeepSpeed's ZeRO 3) makes them whole around a module's forward and again for its
backward, and it finds the backward by the tensors that the forward returns: it does not look into a QuantizerOutput.
Reading through these small modules keeps every parameter whole when it is needed, and gives fp32 whatever the engine
keeps its parameters in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 24
"""Logits that are held at once at inference."""


class LearnedTable(nn.Module):
    """A tensor that an optimiser trains; calling it gives an fp32 copy, differentiable."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.to(torch.float32).contiguous())  # DeepSpeed takes no other strides

    def forward(self) -> Tensor:
        # A copy even if it is fp32 already: the parameter itself is taken away after this.
        return self.weight.to(torch.float32, copy=True)


class LinearHead(nn.Linear):
    """Logits of several groups of codes: fp32 ``(tokens, input_dim)`` → fp32 ``(tokens, groups, codes)``."""

    def __init__(self, input_dim: int, groups: int, codes: int, std: float) -> None:
        super().__init__(input_dim, groups * codes, dtype=torch.float32)
        self.groups = groups
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, latents: Tensor) -> Tensor:
        logits = functional.linear(latents, self.weight.float(), self.bias.float())
        return logits.reshape(len(latents), self.groups, self.out_features // self.groups)

    def likeliest(self, latents: Tensor) -> Tensor:
        """The code with the largest logit, of equal ones the first: int64 ``(tokens, groups)``."""
        rows = max(64, CHUNK_ELEMENTS // self.out_features)
        return torch.cat([self(part).argmax(dim=-1) for part in latents.split(rows)])


class LinearMap(nn.Module):
    """``x Wᵀ + b`` in fp32: ``(..., input_dim)`` → ``(..., output_dim)``."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.to(torch.float32).contiguous())  # DeepSpeed takes no other strides
        self.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=torch.float32))

    def forward(self, vectors: Tensor) -> Tensor:
        return functional.linear(vectors, self.weight.float(), self.bias.float())

    @classmethod
    def pair(cls, input_dim: int, inner_dim: int, output_dim: int) -> tuple[LinearMap, LinearMap]:
        """Maps to a smaller space and back out of it. With equal outer sizes they start as a projection: orthonormal
        axes, which keep distances within them, and their transpose."""
        inner = nn.init.orthogonal_(torch.empty(inner_dim, input_dim))
        outer = inner.T.clone() if input_dim == output_dim else nn.init.orthogonal_(torch.empty(output_dim, inner_dim))
        return cls(inner), cls(outer)
