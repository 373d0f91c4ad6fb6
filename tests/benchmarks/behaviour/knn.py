"""Smoothed VQ with and without the K-nearest-neighbour regulariser (specification, section 4.5).

In: a row of the table and a seed. Out: the error with the mixtures that the decoder was trained on ("soft"), the error
with single codes ("hard"), and how the codes are used. The specification's reconstruction of Morita, arXiv 2509.22161.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.quantizers import build_quantizer
from pipeline.quantizers.base import QuantizerOutput
from tests.benchmarks.behaviour.autoencoder import (
    LATENT_DIM,
    Autoencoder,
    Figures,
    gaussian_classes,
    measure,
    train,
)
from tests.benchmarks.behaviour.tables import beside, figure, markdown

TITLE = "KNN-simplex (4.5)"
SEEDS = 4  # the specification has 2; see the median of hard/soft
BATCH = 512
CODES = 64


@dataclass(frozen=True)
class Row:
    """One line of the table; ``specified``: soft and hard error, perplexity, usage."""

    logits: str
    regulariser: str
    """none, perplexity, l2 or cross_entropy."""
    weight: float
    neighbours: int
    sampler: str
    specified: tuple[str, str, str, str]

    @property
    def name(self) -> str:
        """As the specification writes it."""
        if self.regulariser == "none":
            return "none"
        if self.regulariser == "perplexity":
            return f"perplexity {self.weight:g}"
        return f"{'KNN-L2' if self.regulariser == 'l2' else 'KNN-CE'} {self.weight:g}, K={self.neighbours}"


ROWS = [
    Row("dot", "none", 0, 0, "softmax", (".0083", ".760", "21.4", ".40")),
    Row("dot", "none", 0, 0, "gumbel", (".0260", ".066", "28.8", ".46")),
    Row("dot", "perplexity", 0.1, 0, "softmax", (".0073", "1.490", "33.9", ".67")),
    Row("dot", "perplexity", 1, 0, "gumbel", (".0105", ".0137", "59.8", "1.0")),
    Row("dot", "l2", 1, 8, "softmax", (".0102", ".037", "40.7", ".97")),
    Row("dot", "cross_entropy", 0.1, 8, "softmax", (".0105", ".030", "54.9", "1.0")),
    Row("dot", "cross_entropy", 0.1, 2, "softmax", (".0107", ".0136", "55.8", "1.0")),
    Row("dot", "cross_entropy", 0.1, 2, "gumbel", (".0102", ".0107", "56.8", "1.0")),
    Row("distance", "none", 0, 0, "softmax", (".0081", ".298", "28.2", ".52")),
    Row("distance", "l2", 1, 2, "softmax", (".0119", ".0175", "44.5", ".91")),
    Row("distance", "cross_entropy", 0.1, 2, "softmax", (".0106", ".0125", "54.9", "1.0")),
]


class PerplexityRegularised(nn.Module):
    """A baseline, no kind of Tessera's: smoothed VQ by dot products with wav2vec 2.0's diversity loss in the place of
    neighbours, weight · (codes − exp H(mean p)) / codes with p before any noise."""

    def __init__(self, weight: float, sampler: str) -> None:
        super().__init__()
        self.weight = weight
        self.quantizer: Any = build_quantizer(
            {"kind": "knn_simplex", "dim": LATENT_DIM, "codes": CODES, "logits": "dot", "sampler": sampler, "weight": 0}
        )

    def forward(self, latents: Tensor) -> QuantizerOutput:
        found = self.quantizer(latents)
        mean_mixture = torch.softmax(latents @ self.quantizer.code_vectors()[0].T / LATENT_DIM**0.5, dim=1).mean(dim=0)
        perplexity = torch.exp(-(mean_mixture * torch.log(mean_mixture + 1e-7)).sum())
        return found._replace(losses={"diversity": self.weight * (CODES - perplexity) / CODES})


@cache
def run(row: Row, seed: int, steps: int = 2000) -> Figures:
    """Train one autoencoder."""
    knn = (
        {} if row.regulariser in ("none", "perplexity") else {"distance": row.regulariser, "neighbours": row.neighbours}
    )
    weight = row.weight if knn else 0
    model = Autoencoder(
        {"kind": "knn_simplex", "codes": CODES, "logits": row.logits, "sampler": row.sampler, "weight": weight, **knn},
        seed,
    )
    if row.regulariser == "perplexity":
        model.quantizer = PerplexityRegularised(row.weight, row.sampler)
    data = gaussian_classes(seed)
    train(model, data, seed, steps=steps, batch=BATCH)
    return measure(model, data)


def table(results: Mapping[Row, Sequence[Figures]]) -> str:
    """Means over seeds, and of hard/soft the median and the range: at some seeds one class of the 32 stays a mixture
    of two codes, and its error alone is several times all others'."""
    header = ["logits", "regulariser", "sampler", "soft", "hard", "hard/soft: median, range", "perplexity", "usage"]
    lines = []
    for row, found in results.items():
        gaps = sorted(one.mse / one.soft_mse for one in found)
        lines.append(
            [
                row.logits,
                row.name,
                row.sampler,
                beside((one.soft_mse for one in found), row.specified[0]),
                beside((one.mse for one in found), row.specified[1]),
                f"{figure(statistics.median(gaps))}, {figure(gaps[0])}–{figure(gaps[-1])}",
                beside((one.perplexity for one in found), row.specified[2]),
                beside((one.usage for one in found), row.specified[3]),
            ]
        )
    return markdown(header, lines)
