"""How often each code was used over training, by what the run's checkpoints that still exist tell.

In: runs. Out: HTML; empty for a run with fewer than two checkpoints, and for kinds that keep no counts. Reads nothing
of a checkpoint but the moving averages by which EMA-VQ and the Kohonen map divide (``code_counts``): the log has
measures of use, not counts, and learned codes keep none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.evaluation import page
from pipeline.evaluation.figures import style, svg
from pipeline.evaluation.run_view import RunView, spread
from pipeline.quantizers import Quantizer
from pipeline.training.checkpoint import CheckpointError, buffer_key, rank_file, read_manifest
from pipeline.training.run_folder import Run

logger = logging.getLogger("tessera")

COLUMNS, ROWS, FIGURES = 48, 128, 8
"""At most so many checkpoints and rows to a figure, and figures to a run."""
TICKS = 6
LEAST, MOST = 0.01, 10.0
"""Times even use at the ends of the scale, which goes further up where codes are used more."""


def usage_pictures(runs: Sequence[RunView]) -> list[str]:
    """A figure for each codebook of each run that tells."""
    parts = []
    for run in runs:
        found = counting_quantizers(run.model)
        steps, tables = read_counts(Run(run.path), list(found))
        if len(steps) < 2:
            continue
        drawn = []
        for name, table in tables.items():
            for group in range(table.shape[1]):
                words = [name] if len(tables) > 1 else []
                words += [f"group {group + 1}"] if table.shape[1] > 1 else []
                drawn.append((", ".join(words) or "Use over training", table[:, group]))
        text = caption(next(iter(found.values())))
        if len(drawn) > FIGURES:
            text += f" The first {FIGURES} of {len(drawn)} codebooks."
        figures = [page.figure(usage_map(title, table, steps)) for title, table in drawn[:FIGURES]]
        heading = "Use of each code over training" + (f", {run.name}" if len(runs) > 1 else "")
        parts += [page.heading(heading, 3), page.paragraph(text), page.cards(figures)]
    return parts


def counting_quantizers(model: Any) -> dict[str, Quantizer]:
    """The quantizers of a model, by place in it, that keep a moving average of how often each code was chosen."""
    modules = [] if model is None else model.named_modules()
    return {name: each for name, each in modules if isinstance(each, Quantizer) and hasattr(each, "code_counts")}


def read_counts(run: Run, names: Sequence[str]) -> tuple[list[int], dict[str, Tensor]]:
    """The steps of at most :data:`COLUMNS` of the run's checkpoints, the first and the last among them, and by
    quantizer its counts at each: ``(steps, groups, codes)``. A checkpoint that can't be read is left out, and said.
    """
    from safetensors import SafetensorError, safe_open

    steps: list[int] = []
    tables: dict[str, list[Tensor]] = {name: [] for name in names}
    if not names:
        return steps, {}
    checkpoints = run.list_checkpoints()
    if len(checkpoints) > COLUMNS:
        inside = spread(len(checkpoints) - 2, COLUMNS - 2)
        checkpoints = [checkpoints[0], *(checkpoints[1 + place] for place in inside), checkpoints[-1]]
    for checkpoint in checkpoints:
        try:
            step = read_manifest(checkpoint).step
            with safe_open(checkpoint / rank_file(0), framework="pt") as file:
                counts = [
                    file.get_tensor(buffer_key(f"{name}.code_counts" if name else "code_counts")) for name in names
                ]
        except (CheckpointError, SafetensorError, OSError) as error:
            logger.warning("report: counts of codes of %s are left out: %s", checkpoint, error)
            continue
        steps.append(step)
        for name, of_name in zip(names, counts, strict=True):
            tables[name].append(of_name)
    return steps, {name: torch.stack(of_name) for name, of_name in tables.items() if of_name}


def usage_map(title: str, counts: Tensor, steps: Sequence[int]) -> str:
    """Counts ``(steps, codes)`` as a heat map: codes by their use at the last step, a column a checkpoint."""
    codes = counts.shape[1]
    to_a_row = -(-codes // ROWS)
    shown = even_use(counts, to_a_row).clamp(min=LEAST)
    with style():
        figure = Figure(figsize=(4.6, 3.6))
        axes = figure.subplots()
        norm = LogNorm(LEAST, max(MOST, float(shown.max())))
        image = axes.imshow(shown.numpy(), cmap="viridis", norm=norm, interpolation="none", aspect="auto")
        bar = figure.colorbar(image, ax=axes, shrink=0.85)
        bar.set_label("times even use")
        bar.outline.set_visible(False)
        axes.grid(visible=False)
        apart = -(-len(steps) // TICKS)
        ticks = range((len(steps) - 1) % apart, len(steps), apart)  # the last one among them
        axes.set_xticks(ticks, [f"{steps[tick]:,}" for tick in ticks], fontsize=7.5)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        axes.set_xlabel("checkpoint after so many optimiser steps")
        each = "a row each" if to_a_row == 1 else f"{to_a_row} to a row, their mean"
        axes.set_ylabel(f"{codes:,} codes, {each}")
        return svg(figure, title)


def even_use(counts: Tensor, to_a_row: int = 1) -> Tensor:
    """Counts ``(steps, codes)`` → ``(rows, steps)``, in units of even use; the codes most used at the last step come
    first, and each row is the mean of as many.
    """
    shares = counts.double() / counts.double().sum(dim=1, keepdim=True).clamp(min=1e-30)
    order = shares[-1].argsort(descending=True, stable=True)
    used = shares[:, order].T * counts.shape[1]
    return torch.stack([part.mean(dim=0) for part in used.split(to_a_row)])


def caption(quantizer: Any) -> str:
    """What the counts of this quantizer are."""
    config = quantizer.config
    parts = [
        f"How often codes are chosen in training, as a moving average over some {1 / (1 - config.decay):,.0f} steps: a "
        "column for each checkpoint that still exists, and the most used codes of the last one on top. In the first "
        "steps the average holds the counts at the start too."
    ]
    if getattr(config, "neighbourhood", "none") != "none":
        parts.append("On the map tokens count for their codes' neighbours too, the less the longer it was trained.")
    if not config.update_empty:
        parts.append("A code that nothing chose keeps its value (update_empty=false).")
    return " ".join(parts)
