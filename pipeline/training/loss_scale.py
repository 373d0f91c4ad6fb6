"""fp16's loss scale, and what happens to gradients between the all-reduce and the optimiser under ZeRO 0.

In: an engine, and after each step whether it was applied. Out: the factor on the loss. May touch: ZeRO's loss scale.

Gradients of activations below 6e-8 are zero in fp16: the loss is multiplied by a power of two, which the gradients are
divided by again before they are clipped. A step whose gradients overflow is skipped and halves the factor, and many
good ones double it (Micikevicius et al., arXiv 1710.03740). DeepSpeed 0.19 does it otherwise under autocast: it clips
before it divides, and each rank and each group of parameters decides for itself whether to skip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FIRST = 2.0**16
LEAST = 1.0
LARGEST = 2.0**24
STEPS_BEFORE_GROWTH = 2000


class LossScale:
    """The factor of one run, the same on every rank; 1 for good unless ``enabled``."""

    def __init__(self, engine: Any, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = FIRST if enabled else 1.0
        self._good_steps = 0  # since the last change
        self._optimizer = engine.optimizer
        self._zero = hasattr(engine.optimizer, "override_loss_scale")
        engine.torch_autocast_z0_gradscaler = None
        if self._zero:  # it looks at what the last engine of this process was, and not at its own settings
            engine.optimizer.torch_autocast_gradscaler = None
        if enabled:
            self._tell_optimizer()

    def apply(self, loss: Tensor) -> Tensor:
        """The loss that is to go to ``engine.backward``; ZeRO's multiplies by itself."""
        return loss * self.value if self.enabled and not self._zero else loss

    def update(self, applied: bool) -> float | None:
        """Once a step. Returns the new value if the step has lowered it, and None when it could fall no further or the
        step was applied."""
        if not self.enabled:
            return None
        before = self.value
        self._good_steps = self._good_steps + 1 if applied else 0
        if not applied:
            self.value = max(LEAST, self.value / 2)
        elif self._good_steps == STEPS_BEFORE_GROWTH:
            self.value, self._good_steps = min(LARGEST, self.value * 2), 0
        self._tell_optimizer()
        return self.value if self.value < before else None

    def state(self) -> tuple[float, int] | None:
        """What a checkpoint keeps: the value, and the good steps since it changed; None unless enabled."""
        return (self.value, self._good_steps) if self.enabled else None

    def load(self, state: tuple[float, int] | None) -> None:
        """Go on from :meth:`state`; a checkpoint of another precision has none."""
        if self.enabled and state is not None:
            self.value, self._good_steps = state
            self._tell_optimizer()

    def _tell_optimizer(self) -> None:
        if self._zero:
            self._optimizer.override_loss_scale(self.value)
        else:
            self._optimizer.loss_scale = self.value


def finish_gradients(optimizer: Any, clipping: float) -> None:
    """Let a plain torch optimiser do with each step's gradients what ZeRO's do: divide them by ``loss_scale``, clip
    their joint norm to ``clipping`` if that is not 0, keep the norm in ``_global_grad_norm``, and pass over a step
    whose gradient is not finite and say so by ``overflow``.

    Gradients must be summed over ranks by then, so that all ranks do the same.
    """
    made = optimizer.step
    optimizer.loss_scale = 1.0

    def step(closure: Any = None) -> Any:
        gradients = [
            parameter.grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients) / optimizer.loss_scale
        optimizer._global_grad_norm = norm
        optimizer.overflow = not bool(torch.isfinite(norm))
        if optimizer.overflow:
            return None
        factor = 1.0 / optimizer.loss_scale
        if clipping:
            factor = factor * torch.clamp(clipping / (norm + 1e-6), max=1.0)
        if clipping or factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return made(closure)

    optimizer.step = step
