"""What a run says while it trains: sums over ranks, ``log.jsonl``, TensorBoard.

In: each micro-batch's StepOutput and each step's numbers. Out: one JSON line every N steps. May touch: the run folder's
log and tensorboard (rank 0), and one small all-reduce for each line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline import collectives
from pipeline.codebooks import Alarm
from pipeline.models.base import StepOutput

PERSISTENT_STEPS = 5
"""Watched steps in a row that show a collapse before it is warned of: codes and latents of an untrained encoder often
look collapsed and recover within some hundred steps."""
REMINDER_STEPS = 20
"""Watched steps after which a warning is repeated while its cause lasts."""


class StepMeter:
    """Sums of losses and metrics since the last line, reduced over ranks only when a line is written.

    Losses are summed and divided by the summed targets, metrics are summed numerators over summed denominators: the
    logged numbers are those of the joint batch, on any number of ranks.
    """

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, output: StepOutput, targets: int, *, counts: bool = True) -> None:
        """Add one micro-batch; one that does not count, for it has no finite loss, adds its names only."""
        for name, value in output.losses.items():
            self._add(f"loss/{name}", value.detach().double(), targets, counts)
        for name, (numerator, denominator) in output.metrics.items():
            self._add(f"metric/{name}", numerator.detach().double(), denominator, counts)

    def _add(self, name: str, numerator: torch.Tensor, denominator: torch.Tensor | float, counts: bool) -> None:
        pair = torch.stack(
            [
                numerator.reshape(()),
                torch.as_tensor(denominator, dtype=torch.float64, device=numerator.device).reshape(()),
            ]
        )
        if not counts:
            pair = torch.zeros_like(pair)
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self) -> dict[str, float]:
        """Averages over all ranks and micro-batches since the last call, by name; clears. Called by every rank."""
        names = sorted(self._sums)
        collectives.check_same("|".join(names), "names of the logged values")
        sums = collectives.all_reduce_sum(torch.stack([self._sums[name] for name in names]))
        self._sums.clear()
        values = {
            name: float(pair[0] / pair[1]) if pair[1] else float("nan") for name, pair in zip(names, sums, strict=True)
        }
        losses = {name.removeprefix("loss/"): value for name, value in values.items() if name.startswith("loss/")}
        metrics = {name.removeprefix("metric/"): value for name, value in values.items() if name.startswith("metric/")}
        return {"loss": sum(losses.values()), **{f"loss_{name}": value for name, value in losses.items()}, **metrics}


class AlarmLog:
    """Decides which of a watched step's alarms are worth a warning: one that has lasted :data:`PERSISTENT_STEPS`, and
    from then on every :data:`REMINDER_STEPS`-th time until it has been gone once."""

    def __init__(self) -> None:
        self._lasting: dict[tuple[str, str], int] = {}  # watched steps in a row, by collapse and quantizer

    def warnings(self, alarms: Sequence[Alarm]) -> list[str]:
        """Messages to be said now; called once for each watched step with all of its alarms."""
        found = {(alarm.collapse, alarm.quantizer): alarm.message for alarm in alarms}
        self._lasting = {key: self._lasting.get(key, 0) + 1 for key in found}
        return [
            message
            for key, message in found.items()
            if self._lasting[key] >= PERSISTENT_STEPS and (self._lasting[key] - PERSISTENT_STEPS) % REMINDER_STEPS == 0
        ]


class RunLog:
    """Writes ``log.jsonl`` and TensorBoard from rank 0; on the other ranks it writes nothing."""

    def __init__(self, log_file: Path, tensorboard_folder: Path, attempt: int) -> None:
        self.attempt = attempt
        self._writer: Any = None
        self._file: Any = None
        if collectives.rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            _end_torn_line(log_file)
            self._file = log_file.open("a", buffering=1)
            self._writer = SummaryWriter(str(tensorboard_folder))

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
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._writer.close()


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
