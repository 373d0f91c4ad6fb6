"""Steps whose loss or gradient is not a number: skipped on all ranks together, counted, and in the end an error.

In: each micro-batch's losses, and whether the engine made its step. Out: a count for the log, or :class:`TrainingError`
with the samples' keys. ZeRO 1–3 skip a step whose joint gradient is not finite, and
:func:`pipeline.training.loss_scale.finish_gradients` gives ZeRO 0 the same. A rank that stopped by itself would leave
the others waiting.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline import collectives

logger = logging.getLogger("tessera")

NAMED_KEYS = 20
"""Samples that an error names, at most."""


class TrainingError(RuntimeError):
    """Training can't go on; the message names the step and what was found."""


class SkipGuard:
    """Counts skipped steps and ends the run after ``most`` in a row; every rank has one."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._in_a_row = 0
        self._since_read = 0
        self._keys: list[str] = []  # of micro-batches whose loss was not finite, since the last good step
        self._losses: dict[str, float] = {}
        self._of_step: list[tuple[dict[str, Tensor], Sequence[str]]] = []

    def watch(self, losses: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        """Remember a micro-batch until :meth:`note`. Reads no number: on a GPU that would wait for the forward."""
        self._of_step.append(({name: value.detach() for name, value in losses.items()}, keys))

    def note(self, step: int, applied: bool, micro_batches: Sequence[Any], lowered_to: float | None = None) -> None:
        """What became of a step, the same on every rank. A step that has lowered the loss scale ``lowered_to`` may have
        been the scale's fault: it is counted, but none in a row. Raises :class:`TrainingError` on every rank when it
        was the last straw."""
        of_step, self._of_step = self._of_step, []
        if applied:
            self._in_a_row = 0
            self._keys.clear()
            self._losses.clear()
            return
        for losses, keys in of_step:
            if not all_finite(losses):
                self._keys += keys
                self._losses = {name: float(value) for name, value in losses.items()}
        self._since_read += 1
        if collectives.rank() == 0:
            scale = "" if lowered_to is None else f", the loss scale is {lowered_to:g} now"
            logger.warning("step %d skipped: its loss or gradient is not finite%s", step, scale)
        if lowered_to is not None:
            return
        self._in_a_row += 1
        if self._in_a_row < self.most:
            return
        found = collectives.all_gather_objects((self._keys, self._losses))
        keys = list(dict.fromkeys(key for of_rank, _ in found for key in of_rank))
        losses = {name: value for _, of_rank in found for name, value in of_rank.items()}
        what = f"the loss is not finite ({', '.join(f'{name}={value}' for name, value in losses.items())})"
        if not keys:  # every loss was a number, and its gradient was not
            what = "the gradient is not finite"
            all_keys = collectives.all_gather_objects([key for batch in micro_batches for key in batch.keys])
            keys = [key for of_rank in all_keys for key in of_rank]
        named = ", ".join(keys[:NAMED_KEYS]) + (f" and {len(keys) - NAMED_KEYS} more" if len(keys) > NAMED_KEYS else "")
        raise TrainingError(
            f"step {step}: {what}, {self._in_a_row} steps in a row, on samples {named}: look at these, lower "
            "optimizer.learning_rate or set engine.gradient_clipping; training goes on from the last checkpoint"
        )

    def read(self) -> int:
        """Steps skipped since the last call."""
        count, self._since_read = self._since_read, 0
        return count


def all_finite(losses: Mapping[str, Tensor]) -> Tensor:
    """Whether all losses of a micro-batch are numbers: bool, a scalar on their device."""
    return torch.isfinite(torch.stack([value.detach().float() for value in losses.values()])).all()
