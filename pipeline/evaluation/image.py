"""What an image run is measured by: reconstruction and codes over a whole split.

In: a model, batches and files of networks to compare by. Out: metrics by name, from sums over the set.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch

from pipeline.evaluation.distances import ImageDistances, NetworkFiles
from pipeline.evaluation.probe import QuantizerProbe
from pipeline.evaluation.reconstruction import ImageQuality
from pipeline.models.base import quantizers_of

SUMMED = ("tokens", "dead_codes")
"""Of several levels; of the other metrics the mean is taken."""


@torch.inference_mode()
def measure_images(
    model: Any, batches: Iterable[Any], device: str, files: NetworkFiles
) -> tuple[dict[str, Any], list[Any]]:
    """Run ``model`` over ``batches`` and return its metrics and the code counts ``(groups, codes)`` as lists, of
    several levels one after the other."""
    quality, distances = ImageQuality(), ImageDistances(files, device)
    with ExitStack() as stack:
        probes = {
            level: stack.enter_context(QuantizerProbe(quantizer)) for level, quantizer in quantizers_of(model).items()
        }
        for batch in batches:
            reconstruction, _ = model.reconstruct(batch.pixels.to(device))
            quality.add(batch.pixels, reconstruction)
            distances.add(batch.pixels, reconstruction)
    metrics = {**quality.compute(), **distances.compute(), "samples": quality.images}
    of_levels = {level: probe.compute() for level, probe in probes.items()}
    counts = [group for probe in probes.values() for group in probe.code_counts()]
    return metrics | join_levels(of_levels), counts


def join_levels(of_levels: dict[str, dict[str, float]]) -> dict[str, float]:
    """Metrics by level → those of all levels together, and of several also each one's as ``codebook_usage/LEVEL``."""
    if len(of_levels) == 1:
        return next(iter(of_levels.values()))
    joined: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics in of_levels.values() for name in metrics):
        values = [metrics[name] for metrics in of_levels.values() if name in metrics]
        joined[name] = sum(values) / (1 if name in SUMMED else len(values))
    for level, metrics in of_levels.items():
        joined |= {f"{name}/{level}": value for name, value in metrics.items()}
    return joined
