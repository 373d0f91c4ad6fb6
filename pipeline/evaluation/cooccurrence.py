"""Which codes go with which speaker or language.

In: a speech model and labelled clips. Out: counts ``(groups, labels, codes)``, and what they say. Speech carries both
words and voices; codes of words should say little of the speaker.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.data import SampleReference
from pipeline.data.config import SAMPLE_RATE
from pipeline.evaluation.labels import LabelledClip
from pipeline.evaluation.metrics import plain_collation

LONGEST = 6.0
"""Seconds; of longer clips a part is taken."""


@torch.inference_mode()
def count_codes(model: Any, recipe: Any, clips: Sequence[LabelledClip]) -> list[Tensor]:
    """How often each code occurs in each clip, int64 ``(groups, codes)``."""
    collation = plain_collation(recipe)
    counts = []
    for clip in clips:
        batch = collation([SampleReference(clip.index, 0, limit=int(LONGEST * SAMPLE_RATE))], clip.dataset, 0, 0)
        codes, lengths = model.encode_codes(batch)
        of_groups = codes[0, : int(lengths[0])].T  # (groups, frames); a residual quantizer may leave levels out: -1
        counts.append(torch.stack([g[g >= 0].bincount(minlength=model.quantizer.codes).cpu() for g in of_groups]))
    return counts


def by_label(counts: Sequence[Tensor], labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """Names of the labels, sorted, and the sums of their clips' counts, fp64 ``(groups, labels, codes)``; clips with
    the label "" are left out.
    """
    names = sorted({label for label in labels if label})
    of_names = [
        torch.stack([count for count, label in zip(counts, labels, strict=True) if label == name]).sum(dim=0)
        for name in names
    ]
    return names, torch.stack(of_names, dim=1).double()


def given_code(counts: Tensor) -> Tensor:
    """P(label | code) if every label had spoken as much: ``(labels, codes)`` → ``(labels, codes)``; 0 for a code that
    never occurs.
    """
    of_label = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return of_label / of_label.sum(dim=0).clamp(min=torch.finfo(counts.dtype).tiny)


def information(counts: Tensor) -> float:
    """Mutual information of label and code in bits if every label had spoken as much, ``(labels, codes)``: 0 if codes
    say nothing of the label, log2(labels) if they say all. Few frames make it too high.
    """
    joint = counts / counts.sum(dim=1, keepdim=True).clamp(min=1) / len(counts)
    even = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0)
    return float((joint[joint > 0] * (joint[joint > 0] / even[joint > 0]).log2()).sum())


def in_label_order(shares: Tensor) -> Tensor:
    """The codes that occur, those of the first label first: by the label that a code goes with most, and then by how
    much. ``(labels, codes)`` → ``(used,)``.
    """
    highest, label = shares.max(dim=0)
    order = sorted(range(shares.shape[1]), key=lambda code: (int(label[code]), -float(highest[code])))
    return torch.tensor([code for code in order if highest[code] > 0], dtype=torch.int64)
