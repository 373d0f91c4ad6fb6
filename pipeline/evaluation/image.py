"""What an image run is measured by: reconstruction and codes over a whole split.

In: a model, batches and files of networks to compare by. Out: metrics by name, from sums over the set.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from pipeline.evaluation.distances import ImageDistances, NetworkFiles
from pipeline.evaluation.probe import QuantizerProbe
from pipeline.evaluation.reconstruction import ImageQuality


@torch.inference_mode()
def measure_images(
    model: Any, batches: Iterable[Any], device: str, files: NetworkFiles
) -> tuple[dict[str, Any], list[Any]]:
    """Run ``model`` over ``batches`` and return its metrics and the code counts ``(groups, codes)`` as lists."""
    quality, distances = ImageQuality(), ImageDistances(files, device)
    with QuantizerProbe(model.quantizer) as probe:
        for batch in batches:
            reconstruction, _ = model.reconstruct(batch.pixels.to(device))
            quality.add(batch.pixels, reconstruction)
            distances.add(batch.pixels, reconstruction)
    metrics = {**quality.compute(), **distances.compute(), "samples": quality.images}
    return metrics | probe.compute(), probe.code_counts()
