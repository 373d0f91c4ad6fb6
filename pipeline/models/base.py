"""What every model gives for a micro-batch.

Losses are sums, so that micro-batches of any size and on any rank add up to the loss of the joint batch; the trainer
divides by the step's global number of targets (design rule 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.config import ONLY
from pipeline.quantizers import Quantizer, QuantizerOutput


class StepOutput(NamedTuple):
    """The result of one forward in training; a tuple for ZeRO 3's sake, see QuantizerOutput."""

    losses: dict[str, Tensor]
    """Name → scalar, each summed over the micro-batch's targets."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name → (numerator, denominator), detached sums whose ratio over all micro-batches is the metric."""
    quantizer: QuantizerOutput
    """Of the finest level, where a model has several."""
    coarser: tuple[QuantizerOutput, ...] = ()
    """Of the levels before it, coarse to fine."""


def quantizers_of(model: Any) -> dict[str, Quantizer]:
    """A model's quantizers by level, coarse to fine: its ``quantizers``, or :data:`ONLY` its ``quantizer``."""
    return dict(model.quantizers.items()) if hasattr(model, "quantizers") else {ONLY: model.quantizer}


def quantizer_losses(output: QuantizerOutput, targets: int, level: str = ONLY) -> dict[str, Tensor]:
    """The quantizer's losses, means over real tokens, as sums over ``targets``."""
    return {f"{_prefix(level)}{name}": loss * targets for name, loss in output.losses.items()}


def quantizer_metrics(output: QuantizerOutput, level: str = ONLY) -> dict[str, tuple[Tensor, Tensor]]:
    """The quantizer's metrics, means over real tokens, as (sum over tokens, tokens)."""
    tokens = (output.codes[..., 0] >= 0).sum()
    return {
        # a metric of no tokens may be anything, NaN too
        f"{_prefix(level)}{name}": (torch.where(tokens > 0, value.double() * tokens, 0.0), tokens)
        for name, value in output.metrics.items()
    }


def _prefix(level: str) -> str:
    return f"quantizer_{level}_" if level else "quantizer_"
