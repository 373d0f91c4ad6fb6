"""Figures as SVG that takes its ink from the page: legible on light and on dark, sharp at any size.

In: numbers. Out: SVG text to put into HTML. May touch: nothing; matplotlib draws with its own backend, without a
display.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pipeline.evaluation.history import History

INK = "#010203"
"""Stands for the page's text colour while matplotlib draws; no figure uses it otherwise."""
PALETTE = ("#3b7fc4", "#d9772e", "#3f9d68", "#b8569a", "#93872c", "#7367c9")
STYLE: Any = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.formatter.useoffset": False,
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "tessera",
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Series:
    """One run in a chart."""

    name: str
    history: History
    colour: str
    line: str = "-"


def style() -> Any:
    """Context in which figures of the report are drawn."""
    return matplotlib.rc_context(STYLE)


def svg(figure: Figure, label: str) -> str:
    """The figure as inline SVG without outside references; ``label`` is read out to those who can't see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Inside HTML the namespaces are known; the page should hold no address at all.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace(INK, "currentColor")
    # The page sets the size; the view box keeps the proportions.
    text = re.sub(r'(<svg[^>]*?) (?:width="[^"]*pt"|height="[^"]*pt")', r"\1", text)
    text = re.sub(r'(<svg[^>]*?) (?:width="[^"]*pt"|height="[^"]*pt")', r"\1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label, quote=True)}"', 1)


def line_chart(
    title: str, key: str, series: Sequence[Series], level: tuple[float, str] | None = None, log: bool = False
) -> str:
    """``key`` over steps for each run, with a dashed ``level`` (value, what it is) and a mark where a run was
    resumed.
    """
    with style():
        figure = Figure(figsize=(4.6, 2.7))
        axes = figure.subplots()
        marked = False
        for run in series:
            steps, values = run.history.curve(key)
            marker = "o" if len(steps) == 1 else None
            label = run.name if len(series) > 1 else None
            axes.plot(steps, values, run.line, color=run.colour, label=label, marker=marker)
            axes.plot(*run.history.repeated_points(key), "o", mfc="none", color=run.colour, markersize=6, mew=1)
            for step in run.history.resumed:
                axes.axvline(step, color=run.colour, linestyle=(0, (2, 2)), linewidth=1)
                # Only a run that did not end by itself has steps to do again.
                words = "↻ killed, resumed" if run.history.repeated else "↻ resumed"
                axes.annotate(
                    words if not marked else "↻",
                    (step, 1.0),
                    xycoords=("data", "axes fraction"),
                    xytext=(3, -8),
                    textcoords="offset points",
                    fontsize=7.5,
                )
                marked = True
        if level is not None:
            axes.axhline(level[0], color=INK, linestyle="--", linewidth=0.9, alpha=0.7)
            axes.annotate(
                level[1],
                (1.0, level[0]),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 2),
                textcoords="offset points",
                ha="right",
                fontsize=7.5,
            )
            axes.margins(y=0.12)
        if log:
            axes.set_yscale("log")
        axes.set_title(title)
        axes.set_xlabel("optimiser steps")
        if len(series) > 1:
            axes.legend()
        return svg(figure, title)


def rank_chart(title: str, counts: Sequence[tuple[str, str, Any]]) -> str:
    """How often codes occur, from the most to the least frequent, in units of even use.

    ``counts`` are (name, colour, ``(groups, codes)``) a run; groups are drawn as lines of the same colour.
    """
    with style():
        figure = Figure(figsize=(4.6, 2.7))
        axes = figure.subplots()
        floor = 1.0
        for name, colour, table in counts:
            for group, row in enumerate(np.asarray(table, dtype=np.float64)):
                shares = np.sort(row)[::-1] / max(row.sum(), 1.0) * len(row)
                used = shares[shares > 0]
                if not len(used):
                    continue
                floor = min(floor, used.min())
                places = np.unique(np.geomspace(1, len(used), min(len(used), 300)).astype(int)) - 1
                label = name if group == 0 and len(counts) > 1 else None
                axes.plot(
                    (places + 1) / len(row), used[places], color=colour, label=label, alpha=1 if group == 0 else 0.6
                )
                if len(used) < len(row):
                    axes.plot([len(used) / len(row)], [used[-1]], "x", color=colour, markersize=6)
        axes.axhline(1.0, color=INK, linestyle="--", linewidth=0.9, alpha=0.7)
        axes.annotate(
            "even use",
            (1.0, 1.0),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize=7.5,
        )
        axes.set_yscale("log")
        axes.set_ylim(bottom=floor / 2)
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axes.set_title(title)
        axes.set_xlabel("codes, the most frequent first (× where the used ones end)")
        axes.set_ylabel("times even use")
        if len(counts) > 1:
            axes.legend()
        return svg(figure, title)


def count_chart(title: str, counts: Sequence[tuple[str, str, Any]]) -> str:
    """Histogram: how many codes occur how often. ``counts`` as for :func:`rank_chart`, groups taken together."""
    with style():
        figure = Figure(figsize=(4.6, 2.7))
        axes = figure.subplots()
        tables = [np.asarray(table, dtype=np.float64).ravel() for *_, table in counts]
        highest = max(max(table.max(), 1.0) for table in tables)
        # The first bar holds the codes that never occur; the others are powers of two.
        edges = np.concatenate([[0.5], 2.0 ** np.arange(np.ceil(np.log2(highest + 1)) + 1)])
        for place, ((name, colour, _), table) in enumerate(zip(counts, tables, strict=True)):
            bars, _ = np.histogram(np.maximum(table, 0.5), bins=edges)
            width = 0.8 / len(counts)
            axes.bar(np.arange(len(bars)) + place * width, bars, width, color=colour, align="edge", label=name)
        # Each bar but the first begins at the number below its left edge.
        labels = [_short(int(low)) for low in edges[1:]]
        step = -(-len(labels) // 9)
        axes.set_xticks([0.4, *range(1, len(labels) + 1)[::step]], ["0", *labels[::step]])
        axes.tick_params(axis="x", labelsize=7.5)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.set_title(title)
        axes.set_xlabel("times the code occurs in the set")
        axes.set_ylabel("codes")
        if len(counts) > 1:
            axes.legend()
        return svg(figure, title)


def heat_map(title: str, values: Any, unit: str, colours: str = "cividis", log: bool = False) -> str:
    """Values on a grid ``(rows, columns)`` with their scale; on a logarithmic one, what is not above 0 is left out."""
    values = np.asarray(values, dtype=np.float64)
    rows, columns = values.shape
    height = float(np.clip(4.0 * rows / columns, 1.2, 5.0))
    with style():
        figure = Figure(figsize=(4.6, height + 0.5))
        axes = figure.subplots()
        norm = LogNorm(vmin=1, vmax=max(values.max(), 2)) if log else None
        shown = np.ma.masked_less_equal(values, 0) if log else values
        image = axes.imshow(
            shown, cmap=colours, norm=norm, interpolation="none", aspect="equal" if rows > 1 else "auto"
        )
        bar = figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label(unit)
        bar.outline.set_visible(False)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        return svg(figure, title)


def projection_chart(title: str, projection: Any) -> str:
    """Latents as dots in their own colours, codes as circles, neighbours on a grid joined; see
    :class:`pipeline.evaluation.projection_figures.Projection`. Dots are pixels: so many shapes would make a large page.
    """
    latents, codes, used = projection.latents, projection.codes, projection.used
    with style():
        figure = Figure(figsize=(9.2, 4.6), dpi=120)
        axes = figure.subplots()
        axes.set_rasterization_zorder(2)
        axes.scatter(
            latents[:, 0], latents[:, 1], s=9, c=projection.colours, linewidths=0.2, edgecolors="#808080", zorder=1
        )
        lines = codes[projection.edges]  # (edges, 2 ends, 2 axes)
        axes.add_collection(LineCollection(list(lines), colors="#808080", linewidths=0.5, zorder=1.5))
        size = 26 if len(codes) <= 256 else 9
        axes.scatter(
            codes[used, 0], codes[used, 1], s=size, c="#3b7fc4", linewidths=0.6, edgecolors="white", zorder=1.9
        )
        axes.scatter(
            codes[~used, 0],
            codes[~used, 1],
            s=size,
            facecolors="none",
            linewidths=0.7,
            edgecolors="#d9772e",
            zorder=1.8,
        )
        # A code far from all latents must not make a dot of them.
        low, high = latents.min(axis=0), latents.max(axis=0)
        margin = 0.25 * (high - low)
        axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
        axes.set_title(title)
        axes.set_xlabel("first principal direction")
        axes.set_ylabel("second")
        return svg(figure, title)


def label_map(title: str, names: Sequence[str], values: Any, unit: str) -> str:
    """Shares ``(labels, columns)`` with a name for each row."""
    values = np.asarray(values, dtype=np.float64)
    with style():
        figure = Figure(figsize=(9.2, 0.22 * len(names) + 1.0))
        axes = figure.subplots()
        image = axes.imshow(values, cmap="cividis", vmin=0, interpolation="none", aspect="auto")
        bar = figure.colorbar(image, ax=axes, pad=0.01)
        bar.set_label(unit)
        bar.outline.set_visible(False)
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.set_xlabel("codes, beside those that go with the same label")
        axes.set_yticks(range(len(names)), names, fontsize=7.5)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        return svg(figure, title)


def _short(value: int) -> str:
    return f"{value // 1024}k" if value >= 8192 else str(value)
