"""Batch terms that are not linear in tokens, such as the entropy of a mean: over which tokens they are taken.

In: sums over this rank's tokens. Out: means over a micro-batch or over what all ranks hold at one time. Talks to other
ranks in ``scope=global`` only. No state but a note of forwards, for a warning.

A loss of a mean, f(mean p), is not the mean of the ranks' losses, and the average of the ranks' gradients is not its
gradient. So ``micro_batch`` takes the micro-batch as the unit that no number of ranks changes, and ``global`` sums p
over ranks before f.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from pipeline import collectives

Scope = Literal["micro_batch", "global"]
"""Tokens that a batch term is over: one micro-batch's, or those of the micro-batches all ranks hold at one time."""


def joint_mean(sums: Tensor, count: int, scope: Scope, group: collectives.Group = None) -> Tensor:
    """The mean over tokens of what ``sums`` is the sum of over this rank's ``count`` tokens; zeros when there are none.

    sums ``(...)`` fp32, differentiable → ``(...)``. Under ``global`` every rank of ``group`` must call it, with or
    without tokens: one all-reduce of the sums and the count, in forward only.

    The value is the joint mean, the gradient that of this rank's own mean. A loss L = f(joint mean) then has the joint
    value on each rank, and since the caller weighs rank r's loss by its n_r of all N tokens, as it does losses that are
    means, the weighted gradients sum up to the joint one, Σ_r n_r/N · f'(mean) · ∂(sums_r/n_r) = ∂f(Σ_r sums_r/N).
    """
    own = sums / max(1, count)
    if scope == "micro_batch" or collectives.world_size(group) == 1:
        return own
    packed = torch.cat([sums.detach().reshape(-1), sums.new_tensor([float(count)])])
    collectives.all_reduce_sum(packed, group)
    joint = (packed[:-1] / packed[-1].clamp(min=1)).reshape(sums.shape)
    return joint + (own - own.detach())


def perplexity(probabilities: Tensor) -> Tensor:
    """exp of the entropy in nats: ``(..., codes)`` → ``(...)``. fairseq's 1e-7 keeps log(0) out."""
    return torch.exp(-(probabilities * torch.log(probabilities + 1e-7)).sum(dim=-1))


class ScopeWatch:
    """Warns once when ``scope=global`` meets several forwards a step, where it is not what its name promises."""

    def __init__(self, kind: str, scope: Scope) -> None:
        self.kind, self.scope = kind, scope
        self._forwards = 0
        self._warned = False

    def saw_forward(self) -> None:
        """To be called by ``Quantizer.observe``."""
        self._forwards += 1

    def saw_step(self) -> None:
        """To be called by ``Quantizer.update``."""
        forwards, self._forwards = self._forwards, 0
        if self.scope == "global" and forwards > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.kind} with scope=global was called {forwards} times in one optimiser step: its loss joins what "
                "the ranks hold at one time, not the step's whole batch, and depends on their number; train on as many "
                "ranks as there are micro-batches, or use scope=micro_batch, which any number of ranks computes alike",
                stacklevel=2,
            )
