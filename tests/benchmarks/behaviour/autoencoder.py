"""Data, networks and training that all tables share: Gaussian classes and a small autoencoder around a quantizer.

In: a quantizer's configuration and a seed, which fixes data, initial weights and batches. Out: a trained model and its
figures. The quantizer is reached by its public interface only.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.health import measure_usage
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.base import QuantizerOutput

POINTS, CLASSES, DATA_DIM = 8192, 32, 16
CLASS_DEVIATION = 0.1  # of points from their class's centre; centres are N(0, 1)
LATENT_DIM = 8
LEARNING_RATE = 1e-3


def gaussian_classes(seed: int) -> Tensor:
    """8192 points of 32 classes, ``(points, 16)`` fp32."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, DATA_DIM, generator=generator)
    labels = torch.randint(CLASSES, (POINTS,), generator=generator)
    return centres[labels] + CLASS_DEVIATION * torch.randn(POINTS, DATA_DIM, generator=generator)


class Reconstruction(NamedTuple):
    """What the autoencoder gives: points ``(points, 16)`` and what its quantizer gave."""

    points: Tensor
    quantized: QuantizerOutput


class Autoencoder(nn.Module):
    """16–H–H–8, the quantizer, 8–H–H–16. One seed gives the same two networks around every quantizer."""

    def __init__(self, quantizer: Mapping[str, Any], seed: int, hidden: int = 64) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = _mlp(DATA_DIM, hidden, LATENT_DIM)
        self.decoder = _mlp(LATENT_DIM, hidden, DATA_DIM)
        self.quantizer: Any = build_quantizer(quantizer, dim=LATENT_DIM)

    def forward(self, points: Tensor) -> Reconstruction:
        quantized = self.quantizer(self.encoder(points))
        return Reconstruction(self.decoder(quantized.vectors), quantized)


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def train(model: Autoencoder, data: Tensor, seed: int, *, steps: int, batch: int) -> None:
    """Mean squared error plus the quantizer's losses, by AdamW; batches are drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    sync = CodebookSync(model, optimizer=optimizer)
    model.train()
    for _ in range(steps):
        points = data[torch.randint(len(data), (batch,), generator=generator)]
        found = model(points)
        loss = (found.points - points).square().mean() + sum(found.quantized.losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sync.step()


@dataclass(frozen=True)
class Figures:
    """Of one trained model over all of its data."""

    mse: float
    """With single codes, as at inference."""
    soft_mse: float
    """With what the decoder got in training: mixtures, for smoothed kinds."""
    perplexity: float
    usage: float


@torch.no_grad()
def measure(model: Autoencoder, data: Tensor) -> Figures:
    """Of a copy: a forward in training mode leaves statistics behind."""
    model = copy.deepcopy(model)
    soft = model.train()(data).points
    hard = model.eval()(data)
    health = measure_usage("quantizer", hard.quantized.usage)
    return Figures(
        mse=float((hard.points - data).square().mean()),
        soft_mse=float((soft - data).square().mean()),
        perplexity=health.perplexities[0],
        usage=health.usages[0],
    )
