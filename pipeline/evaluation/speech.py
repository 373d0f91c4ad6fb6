"""What a speech run is measured by: the contrastive task over a whole split.

In: a model and batches. Out: metrics by name, from sums over targets.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from pipeline.evaluation.probe import QuantizerProbe


@torch.inference_mode()
def measure_speech(model: Any, batches: Iterable[Any], negatives: int, device: str) -> tuple[dict[str, Any], list[Any]]:
    """Run ``model`` over ``batches`` and return its metrics and the code counts ``(groups, codes)`` as lists.

    Every number is a ratio of sums over the set, so it does not depend on how the set was cut into batches. Chance is
    log(negatives + 1): the loss of one who can't tell the target from its distractors. Raises ValueError when no clip
    was long enough to be masked.
    """
    sums: dict[str, list[float]] = {}
    clips = targets = 0
    with QuantizerProbe(model.quantizer) as probe:
        for batch in batches:
            clips += len(batch.keys)
            if not batch.targets:
                continue
            targets += batch.targets
            output = model(batch.to(device))
            for name, (numerator, denominator) in output.metrics.items():
                if name.startswith("quantizer_"):  # of the training step; the probe measures the quantizer
                    continue
                pair = sums.setdefault(name, [0.0, 0.0])
                pair[0] += float(numerator)
                pair[1] += float(denominator)
    if not targets:
        raise ValueError(f"none of {clips} clips is long enough to be masked: evaluate on longer clips")
    metrics = {name: total / weight if weight else math.nan for name, (total, weight) in sums.items()}
    # Per target that has a valid distractor: the others add nothing, and in a collapsed codebook they are all there is.
    metrics["contrastive_loss"] = metrics.pop("contrastive")
    metrics |= {"chance_loss": math.log(negatives + 1), "targets": targets, "samples": clips}
    return metrics | probe.compute(), probe.code_counts()
