"""KSOM where EMA-VQ fails (specification, section 1.8): initialisations and update rules, with and without neighbours.

In: a row of the table and a seed. Out: the trained map's figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from pipeline.codebooks.topology import grid_correlation
from tests.benchmarks.behaviour.autoencoder import Autoencoder, Figures, gaussian_classes, measure, train
from tests.benchmarks.behaviour.tables import beside, figure, markdown, mean

TITLE = "KSOM robustness (1.8)"
SEEDS = 3
GRID = (8, 8)


@dataclass(frozen=True)
class Row:
    """One line of the table; the rest is the specification's: MSE, perplexity, usage, Spearman's correlation."""

    neighbourhood: str
    update_empty: bool
    count_init: float
    specified: tuple[str, str, str, str] = ("", "", "", "")


HARD = (".010–.023", "33–35", ".54–.60", ".41–.60")
EXPONENTIAL = (".016–.020", "31–31.5", ".49", ".36–.45")
ROWS = [
    Row("none", True, 0.0, (".070", "27.2", ".45", "-.03")),
    Row("none", True, 1.0, (".090", "25.3", ".42", "-.02")),
    Row("none", False, 0.0, (".995", "1.0", ".016", "n/a")),
    Row("none", False, 1.0, (".086", "25.7", ".42", "-.04")),
    *(Row("hard", update_empty, start, HARD) for update_empty in (True, False) for start in (0.0, 1.0)),
    *(Row("exponential", True, start, EXPONENTIAL) for start in (0.0, 1.0)),
]


@dataclass(frozen=True)
class MapFigures(Figures):
    """With Spearman's rank correlation of the codes' distance on the grid and in space."""

    correlation: float
    """Of codes in use. Decay takes codes that nothing chooses to the origin, where the grid says nothing of them."""
    correlation_of_all: float


@cache
def run(row: Row, seed: int, steps: int = 2000) -> MapFigures:
    """Train one map; ``row.specified`` plays no part."""
    model = Autoencoder(
        {
            "kind": "ksom",
            "codes": 64,
            "grid": GRID,
            "neighbourhood": row.neighbourhood,
            "update_empty": row.update_empty,
            "count_init": row.count_init,
        },
        seed,
    )
    data = gaussian_classes(seed)
    train(model, data, seed, steps=steps, batch=256)
    figures = measure(model, data)
    codebook, on_grid = model.quantizer.codebook()[0], model.quantizer.grid_distance()
    used = model.quantizer.encode(model.encoder(data)).unique()
    return MapFigures(
        **vars(figures),
        correlation=grid_correlation(codebook[used], on_grid[used][:, used]),
        correlation_of_all=grid_correlation(codebook, on_grid),
    )


def table(results: Mapping[Row, Sequence[MapFigures]]) -> str:
    """Means over seeds."""
    header = [
        "neighbourhood",
        "update rule",
        "N0",
        "MSE",
        "perplexity",
        "usage",
        "Spearman(grid, codes)",
        "of all codes",
    ]
    return markdown(
        header,
        [
            [
                row.neighbourhood,
                "update-0" if row.update_empty else "no-update-0",
                f"{row.count_init:.0f}",
                beside((one.mse for one in found), row.specified[0]),
                beside((one.perplexity for one in found), row.specified[1]),
                beside((one.usage for one in found), row.specified[2]),
                beside((one.correlation for one in found), row.specified[3]),
                figure(mean(one.correlation_of_all for one in found)),
            ]
            for row, found in results.items()
        ],
    )
