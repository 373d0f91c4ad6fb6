"""Batch normalisation that does not depend on the number of ranks.

In training each micro-batch is normalised by its own statistics: it holds the same images on any number of ranks. The
running statistics that evaluation normalises by are treated as codebooks are (design rule 4): a forward only adds to
pending sums, and :class:`NormSync` applies those of all norms and ranks in one all-reduce an optimiser step. So an
accumulated, recomputed or skipped forward counts once, once and not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline import collectives


class BatchNorm(nn.Module):
    """Ioffe and Szegedy's (arXiv 1502.03167), over all but the second axis.

    A step's statistics are the means over its micro-batches of their mean and unbiased variance. The first step's are
    taken whole, later ones by ``momentum``. Before the first step there are none, and evaluation too normalises a batch
    by its own: k-means then sees latents as training will.

    Checkpoint behaviour: running statistics and the number of steps are buffers. Pending sums are not in it: a
    checkpoint is written between steps, where there are none.
    """

    running_mean: Tensor
    running_variance: Tensor
    updates: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.epsilon = momentum, epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_variance", torch.ones(channels))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        # (2 · channels + 1,): sums over micro-batches of means and variances, and their number. No buffer:
        # DistributedDataParallel would overwrite it by rank 0's.
        self._pending: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:  # (batch, channels, ...)
        own = self.training or not self.updates
        mean, variance = self.running_mean, self.running_variance
        if own:  # a momentum of 1 makes them the batch's
            mean, variance = torch.zeros_like(mean), torch.zeros_like(variance)
        normalised = functional.batch_norm(
            features, mean, variance, self.weight, self.bias, training=own, momentum=1.0, eps=self.epsilon
        )
        # While autograd runs, a forward is an activation recomputed, seen before.
        if self.training and torch._C._current_graph_task_id() == -1:
            self.pending().add_(torch.cat([mean, variance, mean.new_ones(1)]))
        return normalised

    def pending(self) -> Tensor:
        """The sums since the last step: means, variances, and how many micro-batches they are of."""
        if self._pending is None or self._pending.device != self.updates.device:
            self._pending = torch.zeros(2 * len(self.running_mean) + 1, device=self.updates.device)
        return self._pending

    @torch.no_grad()
    def apply_update(self, summed: Tensor) -> None:
        """Apply one optimiser step's :meth:`pending`, summed over ranks, and clear the own ones."""
        channels = len(self.running_mean)
        mean, variance, number = summed.split([channels, channels, 1])
        share = torch.where(self.updates > 0, self.momentum, 1.0) * (number > 0)
        self.running_mean.lerp_(mean / number.clamp(min=1), share)
        self.running_variance.lerp_(variance / number.clamp(min=1), share)
        self.updates.add_((number[0] > 0).long())
        self.discard_pending()

    def discard_pending(self) -> None:
        """Forget the sums since the last step."""
        self.pending().zero_()


class NormSync:
    """Finds every :class:`BatchNorm` of ``model``; every rank makes it."""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, BatchNorm)]

    def step(self) -> None:
        """Reduce the pending sums of all norms in one all-reduce and apply them. Called by every rank once an optimiser
        step; a model without norms costs nothing."""
        if not self.norms:
            return
        pending = [norm.pending() for norm in self.norms]
        summed = collectives.all_reduce_sum(torch.cat(pending))
        for norm, part in zip(self.norms, summed.split([len(sums) for sums in pending]), strict=True):
            norm.apply_update(part)

    def discard(self) -> None:
        """Forget the sums since the last step instead, of a step that the optimiser did not make."""
        for norm in self.norms:
            norm.discard_pending()
