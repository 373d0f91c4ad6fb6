"""A run as the report sees it: its recipe, log, metrics and, where there is a checkpoint, its model.

In: run folders. Out: :class:`RunView`. May touch: RUN/metrics.json, which is made when it is missing or older than
the newest checkpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.data import ManifestError
from pipeline.evaluation.figures import PALETTE, Series
from pipeline.evaluation.history import History, read_history
from pipeline.evaluation.metrics import evaluate, open_split, read_metrics
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.run_folder import Run

logger = logging.getLogger("tessera")


@dataclass(frozen=True)
class RunView:
    """One run in a report. ``model``, ``dataset`` and ``metrics`` are None where ``missing`` says why."""

    name: str
    path: Path
    colour: str
    recipe: Any
    history: History
    environment: dict[str, Any]
    metrics: dict[str, Any] | None
    model: Any
    dataset: Any
    missing: str
    before: tuple[History, ...] = ()
    """What the phases before the last one logged; ``history`` is the last one's."""

    @property
    def series(self) -> list[Series]:
        """Its curve, and before it those of its earlier phases, whose steps are counted from 0 too."""
        phases = [
            Series(f"{self.name}, phase {number}", history, self.colour, ":")
            for number, history in enumerate(self.before, start=1)
        ]
        return [*phases, Series(self.name, self.history, self.colour)]


def open_runs(paths: Sequence[str | Path]) -> list[RunView]:
    """Open every run and measure those that were not. Raises FileNotFoundError for a folder that holds no run."""
    if not paths:
        raise ValueError("a report needs at least one run folder")
    runs = [Run(path) for path in paths]
    recipes = [run.recipe() for run in runs]
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):  # then the folders tell them apart
        names = (
            [str(path) for path in paths]
            if len({run.path.name for run in runs}) < len(runs)
            else [r.path.name for r in runs]
        )
    views = []
    for place, (run, recipe, name) in enumerate(zip(runs, recipes, names, strict=True)):
        model = dataset = metrics = None
        missing = ""
        try:
            checkpoint = run.latest_checkpoint()
            model, _ = run.load_model(checkpoint)
            dataset = open_split(recipe)
            metrics = read_metrics(run.path)
            if metrics is None or checkpoint is None or metrics["step"] != int(checkpoint.name.removeprefix("step-")):
                metrics = evaluate(run.path)
        except (CheckpointError, ManifestError, OSError, ValueError) as error:
            missing = str(error)
            logger.warning("report: figures of %s are left out: %s", name, error)
        try:
            environment = run.environment()
        except (OSError, json.JSONDecodeError):
            environment = {}
        colour = PALETTE[place % len(PALETTE)]
        history = read_history(run.log())
        before = tuple(read_history(phase.log()) for phase, _ in run.phases(recipe)[:-1])
        views.append(
            RunView(name, run.path, colour, recipe, history, environment, metrics, model, dataset, missing, before)
        )
    return views


def spread(length: int, number: int) -> list[int]:
    """``number`` places spread evenly over ``length``: the samples that figures show, the same every time."""
    number = min(number, length)
    return [round((place + 0.5) * length / number - 0.5) for place in range(number)]
