"""How often a classifier with quantized features names an image's class.

In: a model and batches. Out: metrics by name, from counts over the whole set.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from pipeline.evaluation.probe import QuantizerProbe
from pipeline.models.classifier import accuracies


@torch.inference_mode()
def measure_classifier(model: Any, batches: Iterable[Any], device: str) -> tuple[dict[str, Any], list[Any]]:
    """Run ``model`` over ``batches`` and return its metrics and the code counts ``(groups, codes)`` as lists. Images
    without a label that the model knows are left out of the accuracies."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    images = 0
    with QuantizerProbe(model.quantizer) as probe:
        for batch in batches:
            logits = model.classify(batch.pixels.to(device)).cpu()
            images += len(logits)
            known = (batch.labels >= 0) & (batch.labels < logits.shape[1])
            for name, (right, number) in accuracies(logits[known], batch.labels[known]).items():
                sums[name][0] += float(right)
                sums[name][1] += float(number)
    metrics = {name: right / number if number else None for name, (right, number) in sums.items()}
    return metrics | {"samples": images} | probe.compute(), probe.code_counts()
