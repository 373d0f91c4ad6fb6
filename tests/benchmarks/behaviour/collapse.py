"""Pretraining before quantizing (specification, section 3.4): codebook size and the networks' width.

In: a row of a table and a seed. Out: figures of EMA-VQ, its codes from k-means over the latents of an encoder that is
untrained or was trained with the quantizer ``identity``. The specification's reconstruction of Zhao et al.,
arXiv 2411.16550.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from pipeline.codebooks import initialise_codebooks
from tests.benchmarks.behaviour.autoencoder import POINTS, Autoencoder, Figures, gaussian_classes, measure, train
from tests.benchmarks.behaviour.tables import beside, markdown

TITLE = "Pretraining before quantizing (3.4)"
SEEDS = 2
BATCH = 256
KMEANS_ITERATIONS = 10


@dataclass(frozen=True)
class Row:
    """A codebook and a width; the rest is the specification's, without and with pretraining: MSE, perplexity/usage."""

    codes: int
    hidden: int
    without: tuple[str, str]
    pretrained: tuple[str, str]
    start: str = "spread"
    """Of k-means. spread: k-means++, as :func:`initialise_codebooks` does it; rows: distinct latents drawn evenly."""


BY_CODES = [
    Row(16, 64, (".325", "14.1/1.0"), (".375", "13.9/1.0")),
    Row(32, 64, (".144", "23.6/.78"), (".096", "28.2/1.0")),
    Row(64, 64, (".208", "20.0/.34"), (".0218", "54.5/1.0")),
    Row(128, 64, (".117", "24.0/.20"), (".0096", "110.3/1.0")),
    Row(256, 64, (".102", "25.2/.10"), (".0091", "234.2/1.0")),
    Row(512, 64, (".092", "25.5/.05"), (".0085", "465.4/1.0")),
]
BY_HIDDEN = [
    Row(64, 2, (".995", ""), (".995", "")),
    Row(64, 4, (".830", ""), (".817", "")),
    Row(64, 8, (".405", ""), (".271", "")),
    Row(64, 16, (".191", ""), (".080", "")),
    Row(64, 32, (".126", ""), (".046", "")),
    BY_CODES[2],
    Row(64, 128, (".096", ""), (".046", "")),
]
FROM_ROWS = [replace(row, start="rows") for row in BY_CODES[:3]]
ROWS = [*BY_CODES, *FROM_ROWS, *(row for row in BY_HIDDEN if row not in BY_CODES)]


@dataclass(frozen=True)
class PairOfFigures:
    """The same quantizer on both encoders."""

    without: Figures
    pretrained: Figures


def run(row: Row, seed: int, steps: int = 2000) -> PairOfFigures:
    """Train without and with pretraining; each phase takes ``steps``."""
    return PairOfFigures(
        without=run_one(row, seed, steps, pretrain=False), pretrained=run_one(row, seed, steps, pretrain=True)
    )


@cache
def run_one(row: Row, seed: int, steps: int = 2000, *, pretrain: bool) -> Figures:
    """Initialise the codes and train."""
    data = gaussian_classes(seed)
    model = Autoencoder({"kind": "ema", "codes": row.codes}, seed, row.hidden)
    if pretrain:
        continuous = _pretrained(row.hidden, seed, steps)
        model.encoder.load_state_dict(continuous.encoder.state_dict())
        model.decoder.load_state_dict(continuous.decoder.state_dict())
    if row.start == "spread":
        initialise_codebooks(model, [data], iterations=KMEANS_ITERATIONS, samples_per_code=POINTS // row.codes)
    else:
        _initialise_from_rows(model, data, seed)
    train(model, data, seed, steps=steps, batch=BATCH)
    return measure(model, data)


@cache
def _pretrained(hidden: int, seed: int, steps: int) -> Autoencoder:
    model = Autoencoder({"kind": "identity"}, seed, hidden)
    train(model, gaussian_classes(seed), seed, steps=steps, batch=BATCH)
    return model


@torch.no_grad()
def _initialise_from_rows(model: Autoencoder, data: Tensor, seed: int) -> None:
    """A baseline: the k-means of Zhao et al., arXiv 2605.06870, whose centres start as random distinct rows."""
    latents = model.encoder(data)
    codes = model.quantizer.codes
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))
    centres = latents[order[:codes]]
    for _ in range(KMEANS_ITERATIONS + 1):
        nearest = torch.cdist(latents, centres).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=codes).float()
        found = centres
        sums = torch.zeros_like(centres).index_add_(0, nearest, latents)
        centres = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centres)
    model.quantizer.set_codebook(found.unsqueeze(0), counts.unsqueeze(0))


def table(results: Mapping[Row, Sequence[PairOfFigures]]) -> str:
    """Three tables, means over seeds."""
    header = ["MSE without", "MSE pretrained", "perplexity without", "pretrained", "usage without", "pretrained"]
    by_codes = [[str(row.codes), *_line(row, results[row])] for row in BY_CODES]
    from_rows = [[str(row.codes), *_line(row, results[row])] for row in FROM_ROWS]
    by_hidden = [[str(row.hidden), *_line(row, results[row])] for row in BY_HIDDEN]
    return "\n\n".join(
        [
            markdown(["K", *header], by_codes),
            "The same with k-means that starts from random latents, where ours starts with k-means++:",
            markdown(["K", *header], from_rows),
            "The networks' width H, K = 64:",
            markdown(["H", *header], by_hidden),
        ]
    )


def _line(row: Row, found: Sequence[PairOfFigures]) -> list[str]:
    without, pretrained = [one.without for one in found], [one.pretrained for one in found]
    perplexity_without, _, usage_without = row.without[1].partition("/")
    perplexity, _, usage = row.pretrained[1].partition("/")
    return [
        beside((one.mse for one in without), row.without[0]),
        beside((one.mse for one in pretrained), row.pretrained[0]),
        beside((one.perplexity for one in without), perplexity_without),
        beside((one.perplexity for one in pretrained), perplexity),
        beside((one.usage for one in without), usage_without),
        beside((one.usage for one in pretrained), usage),
    ]
