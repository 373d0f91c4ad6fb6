"""What a claim is, and how its runs are made.

In: a claim, a prepared data set and a folder. Out: each run's metrics and log. What is done is not done again: killed,
the same command goes on, a training from its newest checkpoint.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.manifest import MANIFEST_NAME
from pipeline.evaluation import evaluate
from pipeline.evaluation.history import History, read_history
from pipeline.evaluation.metrics import read_metrics
from pipeline.training import train
from pipeline.training.run_folder import Run
from recipes.schema import Recipe, load_recipe
from tests.benchmarks.behaviour.tables import markdown

SPLIT = "train=0.9,validation=0.1"
OF_32_PIXELS = ("data.image_size=32", "data.resize=64", "batch.micro_batches=1", "batch.samples=64")
"""Photographs at CIFAR-10's size, in batches for a CPU."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a name, what it changes in the recipe, and the paper's values by column."""

    name: str
    overrides: tuple[str, ...]
    paper: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What one run gave."""

    metrics: dict[str, Any]
    history: History


Figure = Callable[[Sequence[Outcome]], str]
"""A cell: from the outcomes of a row's seeds."""


Beside = Callable[[Recipe, Path, Path, int], Iterable[tuple[Row, list[Outcome]]]]
"""From the recipe as shortened, the data, the folder for results and the number of seeds."""


@dataclass(frozen=True)
class Claim:
    """A table. ``quick`` makes the recipe small enough for a CPU; ``about`` says what the paper claims and how this
    differs from it."""

    title: str
    about: str
    recipe: str
    data: str
    """Part of the corpus: "tiles", "fashion" …"""
    rows: Sequence[Row]
    columns: Mapping[str, Figure]
    quick: tuple[str, ...] = ()
    seeds: int = 1
    split: str = SPLIT
    beside: Beside | None = None
    """Further rows, that are no runs of the recipe."""


def prepare(part: str, split: str, out: Path, corpus: Path | None) -> Path:
    """The prepared data set of a part of the corpus of `make corpus`, made when it is missing."""
    data = out / "data" / part
    if (data / MANIFEST_NAME).exists():
        return data
    if corpus is None:
        corpus = out / "corpus"
        done = corpus / f"{part}.done"
        if not done.exists():
            _run("tests.benchmarks.corpus", "--out", str(corpus), "--only", part)
            done.touch()
    _run("launch.cli", "prepare", "images", str(corpus / part), str(data), "--split", split)
    return data


def outcomes(
    claim: Claim, data: Path, out: Path, *, full: bool, seeds: int | None, changes: Iterable[str]
) -> list[tuple[Row, list[Outcome]]]:
    """Each row's runs, one a seed."""
    budget = () if full else claim.quick
    found: list[tuple[Row, list[Outcome]]] = []
    for row in claim.rows:
        found.append((row, []))
        for seed in range(seeds or claim.seeds):
            overrides = [f"data.path={data}", *budget, *row.overrides, f"seed={seed}", *changes]
            run = out / f"{row.name} {seed}".replace(" ", "_").replace("/", "_")
            found[-1][1].append(outcome(claim.recipe, overrides, run))
    if claim.beside is not None:
        recipe = load_recipe(claim.recipe, [f"data.path={data}", *budget, *changes])
        found += claim.beside(recipe, data, out, seeds or claim.seeds)
    return found


def outcome(recipe_name: str, overrides: Sequence[str], run: Path) -> Outcome:
    """Train and evaluate, as far as that was not done."""
    recipe = load_recipe(recipe_name, overrides)
    metrics = read_metrics(run)
    if metrics is None or metrics["step"] != recipe.training.steps:
        print(f"{run.name}: {recipe.training.steps} steps", file=sys.stderr, flush=True)
        train(recipe, run)
        metrics = evaluate(run)
    return Outcome(metrics, read_history(Run(run).log()))


def table(claim: Claim, found: Iterable[tuple[Row, Sequence[Outcome]]]) -> str:
    """Markdown; the paper's value stands in brackets behind ours."""
    lines = []
    for row, outcomes_of_row in found:
        cells = [row.name]
        for name, figure in claim.columns.items():
            ours = figure(outcomes_of_row)
            cells.append(f"{ours} ({row.paper[name]})" if name in row.paper else ours)
        lines.append(cells)
    return markdown(["", *claim.columns], lines)


# -- cells -------------------------------------------------------------------------------------------------------------


def metric(key: str, digits: int, scale: float = 1.0) -> Figure:
    """The mean over seeds of a metric of `tessera evaluate`, with the range where there are several."""

    def cell(found: Sequence[Outcome]) -> str:
        values = [one.metrics.get(key) for one in found]
        return numbers([value * scale for value in values if value is not None], digits)

    return cell


def numbers(values: Sequence[float], digits: int) -> str:
    """The mean, and behind it the range of several values."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def steps_to_within(name: str, share: float) -> Figure:
    """Steps until the logged curve ``name`` first comes within ``share`` of its own best, a mean over seeds."""

    def cell(found: Sequence[Outcome]) -> str:
        reached = []
        for one in found:
            steps, values = one.history.curve(name, points=100)
            limit = min(values) * (1 + share)
            reached.append(next(step for step, value in zip(steps, values, strict=True) if value <= limit))
        return numbers(reached, 0)

    return cell


def last_logged(name: str, digits: int, scale: float = 1.0, lines: int = 5) -> Figure:
    """The mean over seeds of the last ``lines`` logged values of a curve."""

    def cell(found: Sequence[Outcome]) -> str:
        tails = [one.history.curve(name, points=1_000_000)[1][-lines:] for one in found]
        return numbers([statistics.fmean(tail) * scale for tail in tails if tail], digits)

    return cell


def _run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=sys.stderr)
