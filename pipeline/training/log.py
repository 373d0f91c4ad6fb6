"""What a run says while it trains: sums over ranks, ``log.jsonl``, TensorBoard, Weights & Biases.

In: each micro-batch's StepOutput and each step's numbers. Out: one JSON line every N steps. May touch: the run folder's
log, tensorboard and wandb (rank 0), and one small all-reduce for each line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline import collectives
from pipeline.models.base import StepOutput
from pipeline.training.guard import all_finite

if TYPE_CHECKING:
    from pipeline.training.run_folder import Run
    from recipes.schema import Recipe


class StepMeter:
    """Sums of losses and metrics since the last line, reduced over ranks only when a line is written.

    Losses are summed and divided by the summed targets, metrics are summed numerators over summed denominators: the
    logged numbers are those of the joint batch, on any number of ranks.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], torch.Tensor] = {}  # by their names: fp64 (2, names)

    def add(self, output: StepOutput, targets: int) -> None:
        """Add one micro-batch; one without a finite loss adds its names only. Reads no number of the device's."""
        losses, metrics = output.losses, output.metrics
        numerators = [*losses.values(), *(numerator for numerator, _ in metrics.values())]
        sums = torch.stack([value.detach().double().reshape(()) for value in numerators])
        over = torch.full_like(sums, targets)
        if metrics:
            denominators = [denominator.to(over).reshape(()) for _, denominator in metrics.values()]
            over[len(losses) :] = torch.stack(denominators)
        pairs = torch.where(all_finite(losses), torch.stack([sums, over]), 0.0)
        names = (*(f"loss/{name}" for name in losses), *(f"metric/{name}" for name in metrics))
        self._sums[names] = self._sums[names] + pairs if names in self._sums else pairs

    def read(self) -> dict[str, float]:
        """Averages over all ranks and micro-batches since the last call, by name; clears. Called by every rank."""
        pairs: dict[str, torch.Tensor] = {}
        for names_at_once, sums in self._sums.items():
            for name, pair in zip(names_at_once, sums.T, strict=True):
                pairs[name] = pairs[name] + pair if name in pairs else pair
        names = sorted(pairs)
        collectives.check_same("|".join(names), "names of the logged values")
        sums = collectives.all_reduce_sum(torch.stack([pairs[name] for name in names]))
        self._sums.clear()
        values = {
            name: float(pair[0] / pair[1]) if pair[1] else float("nan") for name, pair in zip(names, sums, strict=True)
        }
        losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        metrics = {name.removeprefix("metric/"): value for name, value in values.items() if name.startswith("metric/")}
        return {"loss": sum(losses.values()), **{f"loss_{name}": value for name, value in losses.items()}, **metrics}


class RunLog:
    """Writes ``log.jsonl``, TensorBoard and, if the recipe asks for it, Weights & Biases from rank 0; on the other
    ranks it writes nothing."""

    def __init__(self, run: Run, recipe: Recipe) -> None:
        self.attempt = last_attempt(run.log_file) + 1
        self._file: Any = None
        self._writer: Any = None
        self._wandb: Any = None
        if collectives.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            _end_torn_line(run.log_file)
            self._file = run.log_file.open("a", buffering=1)
            self._writer = SummaryWriter(str(run.path / "tensorboard"))
            if recipe.training.wandb:
                self._wandb = _open_wandb(run, recipe)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line for ``step`` (optimiser steps done); what is no number is in ``log.jsonl`` only."""
        if self._file is None:
            return
        # JSON has no NaN; every other number is written in full, so that two runs can be compared bit for bit.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"step": step, "attempt": self.attempt, **finite}) + "\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb(project: str | None) -> None:
    """Raise RecipeError when a project is asked for and the package is not there."""
    from recipes.schema import RecipeError

    if project and importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            f"training.wandb={project}: the package wandb is not installed here: pip install wandb, or leave "
            "training.wandb out; log.jsonl and TensorBoard hold the same numbers"
        )


def _open_wandb(run: Run, recipe: Recipe) -> Any:
    import wandb

    # The folder's path names the run, so that a resumed one goes on where it was.
    name = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:16]
    return wandb.init(
        project=recipe.training.wandb,
        id=name,
        name=run.path.name,
        resume="allow",
        dir=str(run.path),
        config=recipe.model_dump(mode="json"),
    )


def last_attempt(log_file: Path) -> int:
    """Number of the last start that wrote a line, 0 if none did."""
    if not log_file.is_file():
        return 0
    attempts = [0]
    for line in log_file.read_text().splitlines():
        try:
            attempts.append(json.loads(line)["attempt"])
        except (json.JSONDecodeError, KeyError):
            continue
    return max(attempts)


def _end_torn_line(log_file: Path) -> None:
    """A kill in the middle of a line must not glue the next line to it."""
    if log_file.is_file() and not log_file.read_bytes().endswith(b"\n") and log_file.stat().st_size:
        with log_file.open("a") as stream:
            stream.write("\n")
