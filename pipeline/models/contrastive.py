"""The contrastive objective of wav2vec 2.0 (Baevski et al., arXiv 2006.11477, equation 3).

In: context and target vectors of the masked frames, and which of them are distractors. Out: the summed loss and its
counts. Pure functions, fp32.

Cosines come from one frames × frames product an utterance, and the distractors' are picked from it by index: gathering
the distractors' vectors instead costs 15 times the CPU time at usual sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

COSINE_ROUNDING = 1e-6
"""Cosines nearer than this are tied: equal vectors' fp32 products differ by a few 1e-7 with their place in a matrix."""


@dataclass
class ContrastiveOutput:
    """Sums over the masked frames of a micro-batch. A distractor equal to its positive is not valid; a frame without
    any valid distractor asks nothing: it adds no loss and is not counted.
    """

    loss: Tensor
    """Scalar, differentiable: cross-entropy in nats, summed over frames with a valid distractor."""
    correct: Tensor
    """Frames whose positive is nearer than every valid distractor; ties are wrong."""
    valid_targets: Tensor
    """Frames with a valid distractor."""
    valid_negatives: Tensor
    negatives: Tensor


def contrast(
    context: Tensor, targets: Tensor, quantized: Tensor, counts: list[int], negatives: Tensor, temperature: float
) -> ContrastiveOutput:
    """Tell each frame's target from its distractors.

    *Shape:* context and targets ``(masked, final_dim)``, the masked frames of all utterances one after another;
    quantized ``(masked, dim)``, by which equal targets are known; ``counts`` masked frames of each utterance; negatives
    ``(batch, max_masked, K)`` of any integers, indices into the utterance's masked frames.
    """
    context = functional.normalize(context.float(), dim=-1)
    targets = functional.normalize(targets.float(), dim=-1)
    # Equal vectors get equal numbers: exact, for hard codes of any number of groups as for mixtures.
    identity = torch.unique(quantized.detach(), dim=0, return_inverse=True)[1] if len(quantized) else quantized
    losses, correct, valid, valid_negatives, drawn_negatives = [], [], [], [], []
    start = 0
    for row, count in enumerate(counts):
        frames = slice(start, start + count)
        start += count
        if count < 2:  # nothing to tell it from
            continue
        with torch.autocast(context.device.type, enabled=False):  # rounding to bf16 would move a logit by 0.04
            similarities = context[frames] @ targets[frames].T / temperature  # (count, count)
        drawn = negatives[row, :count].long()  # (count, K)
        equal = identity[frames][drawn] == identity[frames].unsqueeze(1)
        wrong = similarities.gather(1, drawn).masked_fill(equal, -torch.inf)
        right = similarities.diagonal()
        asked = ~equal.all(dim=1)
        logits = torch.cat([right.unsqueeze(1), wrong], dim=1)
        losses.append((logits.logsumexp(dim=1) - right)[asked].sum())
        correct.append(((right - wrong.amax(dim=1) > COSINE_ROUNDING / temperature) & asked).sum())
        valid.append(asked.sum())
        valid_negatives.append((~equal).sum())
        drawn_negatives.append(drawn.numel())
    zero = context.sum() * 0.0 + targets.sum() * 0.0  # keeps the graph where no utterance asks anything
    none = torch.zeros((), dtype=torch.int64, device=context.device)
    return ContrastiveOutput(
        loss=torch.stack([zero, *losses]).sum(),
        correct=torch.stack([none, *correct]).sum(),
        valid_targets=torch.stack([none, *valid]).sum(),
        valid_negatives=torch.stack([none, *valid_negatives]).sum(),
        negatives=none + sum(drawn_negatives),
    )
