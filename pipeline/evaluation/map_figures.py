"""The pictures of ViT-SOM's map: labels, hits and borders at the places of its units, and prototypes as the decoder
shows them.

In: a run with its model and metrics. Out: HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from pipeline.codebooks.topology import u_matrix
from pipeline.evaluation import page
from pipeline.evaluation.figures import style, svg
from pipeline.evaluation.image_figures import mosaic
from pipeline.evaluation.run_view import RunView

NAMED = 20
"""Classes that a legend names, at most."""
SQUARE = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
HEXAGON = np.array([(np.sin(angle), np.cos(angle)) for angle in np.arange(6) * np.pi / 3]) / np.sqrt(3)
"""Corners of a unit whose neighbours are 1 apart."""


@torch.inference_mode()
def map_pictures(run: RunView) -> list[str]:
    """Everything there is to see of the map of a ViT-SOM, if it has one of at most two axes."""
    if run.model is None or run.recipe.model.kind != "vit_som" or run.recipe.quantizer.kind != "som":
        return []
    quantizer = run.model.quantizer
    if len(quantizer.grid) > 2:
        return []
    places, hexagonal = quantizer.grid_places(), quantizer.config.topology == "hexagonal"
    metrics: dict[str, Any] = run.metrics or {}
    figures = []
    if "label_counts" in metrics:
        table = torch.tensor(metrics["label_counts"])
        names = run.dataset.manifest.classes or [str(label) for label in range(table.shape[1])]
        figures.append(
            page.figure(
                label_figure(table, names, places, hexagonal),
                "The most frequent label of each unit, the paler the less pure; units without images are left out.",
            )
        )
    if metrics.get("code_counts"):
        counts = torch.tensor(metrics["code_counts"][0], dtype=torch.float64)
        figures.append(
            page.figure(
                value_figure("How many images a unit is nearest to", counts, places, hexagonal, "images", log=True),
                "Over the whole split; units without images are left out.",
            )
        )
    borders = u_matrix(quantizer.codebook()[0], [quantizer.codes], quantizer.are_neighbours)
    figures.append(
        page.figure(
            value_figure("U-matrix", borders, places, hexagonal, "distance to the neighbours"),
            "High values are borders between regions of like prototypes.",
        )
    )
    if run.model.decoder is not None:
        tiles = prototype_tiles(run.model)
        figures.append(
            page.figure(
                page.image(mosaic(tiles, quantizer.grid[0]), f"prototypes of {run.name}", "pixels"),
                "Each prototype as the decoder shows it, at its place: neighbours look alike."
                + (" Every other row stands half a place to the right." if hexagonal else ""),
            )
        )
    shape = " × ".join(map(str, quantizer.grid))
    return [page.heading(f"Map of {run.name}: {shape} units", 3), page.cards(figures)]


def prototype_tiles(model: Any, chunk: int = 128) -> Tensor:
    """``(codes, 3, side, side)`` in [0, 1]."""
    codes = torch.arange(model.quantizer.codes, device=model.quantizer.updates.device)
    return torch.cat([model.decode_codes(part[:, None, None, None]).cpu() for part in codes.split(chunk)])


def label_figure(table: Tensor, names: Sequence[str], places: Tensor, hexagonal: bool) -> str:
    """Majority labels of counts ``(codes, labels)``, a colour each, whose strength is the unit's purity."""
    totals = table.sum(dim=1)
    hit = totals > 0
    largest, label = table.max(dim=1)
    colours = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20" if len(names) <= 20 else "hsv"]
    palette = [colours(number / len(names) if len(names) > 20 else number) for number in range(len(names))]
    faces = np.array([palette[number] for number in label.tolist()])
    faces[:, 3] = (largest / totals.clamp(min=1)).numpy()
    with style():
        figure, axes = _unit_axes("Label map", places)
        axes.add_collection(_units(places[hit], hexagonal, facecolors=faces[hit.numpy()]))
        if len(names) <= NAMED:
            patches = [Patch(color=colour, label=name) for colour, name in zip(palette, names, strict=True)]
            figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=7, handlelength=1)
        return svg(figure, "Label map")


def value_figure(title: str, values: Tensor, places: Tensor, hexagonal: bool, unit: str, *, log: bool = False) -> str:
    """Values ``(codes,)`` at their places with their scale; on a logarithmic one, what is not above 0 is left out."""
    shown = values > 0 if log else torch.ones_like(values, dtype=torch.bool)
    norm = LogNorm(1, max(2.0, float(values.max()))) if log else Normalize(float(values.min()), float(values.max()))
    with style():
        figure, axes = _unit_axes(title, places)
        drawn = _units(places[shown], hexagonal, cmap="viridis" if log else "cividis", norm=norm)
        drawn.set_array(values[shown].numpy())
        axes.add_collection(drawn)
        bar = figure.colorbar(drawn, ax=axes, shrink=0.85)
        bar.set_label(unit)
        bar.outline.set_visible(False)
        return svg(figure, title)


def _unit_axes(title: str, places: Tensor) -> tuple[Figure, Any]:
    across, down = _across_and_down(places)
    width, height = float(np.ptp(across)) + 1, float(np.ptp(down)) + 1
    figure = Figure(figsize=(4.6, float(np.clip(4.0 * height / width, 0.8, 5.0)) + 0.7))
    axes = figure.subplots()
    axes.set_xlim(across.min() - 0.6, across.max() + 0.6)
    axes.set_ylim(down.max() + 0.6, down.min() - 0.6)  # the first row on top
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title)
    return figure, axes


def _units(places: Tensor, hexagonal: bool, **options: Any) -> PolyCollection:
    centres = np.stack(_across_and_down(places), axis=1)
    corners = HEXAGON if hexagonal else SQUARE
    # Drawn as pixels: a large map has thousands of units.
    return PolyCollection(centres[:, None] + corners, edgecolors="none", rasterized=True, **options)


def _across_and_down(places: Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = places.cpu().numpy().astype(np.float64)
    return values[:, 0], values[:, 1] if values.shape[1] > 1 else np.zeros(len(values))
