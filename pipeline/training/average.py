"""An exponential moving average of the weights (``training.weight_ema``), beside those that are trained.

In: an engine, after each step that was applied. Out: for each trained weight its average, which evaluation and exports
use. May touch: nothing of the engine.

Each rank averages the stretches that it alone saves (:mod:`pipeline.training.engine_state`), under every ZeRO stage:
together they are one average, fp32, whatever the number of ranks. What is averaged are parameters, learned codes among
them; buffers are as they are: the state of codebooks that are averages already, and running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pipeline.training.engine_state import AVERAGE, WEIGHT, Source, owned_pieces

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from pipeline.training.engine_state import Piece


def decay_after(steps: int, decay: float) -> float:
    """What of the average stays at the update after ``steps`` steps of the run: less at first, so that the average of a
    short run is not its beginning (as in TensorFlow's ``ExponentialMovingAverage``)."""
    return min(decay, (1 + steps) / (10 + steps))


class WeightAverage:
    """This rank's part of the average; begins as a copy of the weights that the engine has."""

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        self.decay = decay
        trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
        weights = [piece for piece in owned_pieces(engine) if piece.part == WEIGHT and piece.name in trained]
        self._weights = [piece.values for piece in weights]
        self._pieces = [replace(piece, part=AVERAGE, values=piece.values.clone()) for piece in weights]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Once after each applied step, ``steps`` having been made before it."""
        if self._pieces:
            share = 1 - decay_after(steps, self.decay)
            torch._foreach_lerp_([piece.values for piece in self._pieces], self._weights, share)

    def pieces(self) -> Iterator[Piece]:
        """What a checkpoint keeps of it."""
        return iter(self._pieces)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Go on from a checkpoint. One without an average begins it with the weights."""
        for piece, weight in zip(self._pieces, self._weights, strict=True):
            values = source.read(piece.name, AVERAGE, piece.start, piece.values.numel())
            piece.values.copy_(weight if values is None else values)
