"""The Fréchet distance of two sets of images: how far apart Gaussians are that fit their features.

Heusel et al. 2017 (arXiv 1706.08500), equation 6: ‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½). In: batches of originals and
reconstructions, and a network that gives features. Out: one number, from sums: no image's features are kept.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.codebooks.collapse import SecondMoments

RANDOM_WIDTHS = (32, 64, 128, 256)


class FrechetDistance:
    """Collects the moments of ``network``'s features, ``(batch, features)``, in float64."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._originals, self._reconstructions = SecondMoments(), SecondMoments()

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add images ``(batch, 3, height, width)`` in [0, 1], on the network's device."""
        self._originals.add(self.network(originals).cpu())
        self._reconstructions.add(self.network(reconstructions).cpu())

    def compute(self) -> float | None:
        """The distance; None for fewer than two images, which have no covariance."""
        count = self._originals.count
        if count < 2:
            return None
        sample = count / (count - 1)  # the covariance of a sample, as published distances take it
        return gaussian_distance(
            self._originals.mean(),
            self._originals.covariance() * sample,
            self._reconstructions.mean(),
            self._reconstructions.covariance() * sample,
        )


def gaussian_distance(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    """Squared Fréchet (Wasserstein-2) distance of two Gaussians: means ``(features,)``, covariances
    ``(features, features)``, float64.

    The trace of (C₁ C₂)^½ is that of (C₁^½ C₂ C₁^½)^½, which is symmetric: its eigenvalues are real, whatever rounding
    does, also where there are fewer images than features.
    """
    variances, axes = torch.linalg.eigh(covariance)
    root = (axes * variances.clamp(min=0).sqrt()) @ axes.T
    product = root @ other_covariance @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * shared
    return max(0.0, float(distance))  # equal sets are 0 up to rounding


class RandomFeatures(nn.Module):
    """Features without training, for want of weights: means over places of what each of four convolutions answers.

    3 × 3, stride 2, ReLU. Weights are uniform with He's variance, from the raw stream of Philox, which is the same with
    every version of NumPy and on every machine; so distances of two runs can be compared wherever they were measured.
    Such features tell blur, noise, colour and lost contrast; they know nothing of what a picture shows.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        stream = np.random.Philox(key=seed)
        layers, width = [], 3
        for wider in RANDOM_WIDTHS:
            layer = nn.utils.skip_init(nn.Conv2d, width, wider, 3, stride=2, padding=1, bias=False)
            bound = math.sqrt(6 / (9 * width))
            raw = stream.random_raw(layer.weight.numel()) >> np.uint64(11)  # the 53 bits that float64 holds
            values = (raw * 2.0**-52 - 1.0) * bound
            layer.weight.data = torch.from_numpy(values.astype(np.float32)).view_as(layer.weight)
            layers.append(layer)
            width = wider
        self.layers = nn.ModuleList(layers)
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, 3, height, width)`` in [0, 1] → ``(batch, 480)``."""
        values, answers = images.float() * 2 - 1, []
        for layer in self.layers:
            values = layer(values).relu()
            answers.append(values.mean(dim=(2, 3)))
        return torch.cat(answers, dim=1)
