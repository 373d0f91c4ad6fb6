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


class LearnedTable(nn.Module):
    """A tensor that an optimiser trains; calling it gives an fp32 copy, differentiable."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values.to(torch.float32).contiguous())  # DeepSpeed takes no other strides

    def forward(self) -> Tensor:
        # A copy even if it is fp32 already: the parameter itself is taken away after this.
        return self.weight.to(torch.float32, copy=True)


class LogitWeights(nn.Module):
    """Weight ``(groups · codes, dim)``, normal with deviation ``std``, and bias ``(groups · codes,)``, 0 at first, of a
    linear map to logits; calling it gives fp32 copies of both by group: ``(groups, codes, dim)``, ``(groups, codes)``,
    differentiable."""

    def __init__(self, groups: int, codes: int, dim: int, std: float) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.randn(groups * codes, dim, dtype=torch.float32) * std)
        self.bias = nn.Parameter(torch.zeros(groups * codes, dtype=torch.float32))

    def forward(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.weight.to(torch.float32, copy=True), self.bias.to(torch.float32, copy=True)
        return weight.unflatten(0, (self.groups, -1)), bias.unflatten(0, (self.groups, -1))


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
