"""How well a map's codes, or the classes that a head names, agree with the images' labels.

In: a model with a map and batches, or counts. Out: metrics by name, from counts over the whole set.

Purity is the published code's, and NMI scikit-learn's ``normalized_mutual_info_score``: natural logarithms, over the
arithmetic mean of the entropies. Purity grows with the number of codes by itself: it is 1 where every image has a code
of its own, and is to be compared between maps of one size only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pipeline.codebooks.topology import grid_correlation
from pipeline.evaluation.codebook import CodeCounts
from pipeline.evaluation.reconstruction import ImageQuality


class LabelCounts:
    """How often each label goes with each code, over a whole set; images without a label (−1) are left out."""

    def __init__(self) -> None:
        self._pairs: list[Tensor] = []

    def add(self, codes: Tensor, labels: Tensor) -> None:
        """Codes and labels of a batch, both int64 ``(batch,)``."""
        pairs = torch.stack([codes.cpu(), labels.cpu()], dim=1)
        self._pairs.append(pairs[pairs[:, 1] >= 0])

    def table(self, codes: int) -> Tensor:
        """Counts ``(codes, labels)`` int64; no labels where no image has one."""
        pairs = torch.cat(self._pairs) if self._pairs else torch.empty(0, 2, dtype=torch.int64)
        labels = int(pairs[:, 1].max()) + 1 if len(pairs) else 0
        places = pairs[:, 0] * labels + pairs[:, 1]
        return torch.bincount(places, minlength=codes * labels).reshape(codes, labels)


@torch.inference_mode()
def measure_map(model: Any, batches: Iterable[Any], device: str) -> tuple[dict[str, Any], list[Any]]:
    """Run ViT-SOM over ``batches``: metrics, with ``label_counts`` (codes × labels) among them where there are labels,
    and the code counts ``(groups, codes)`` as lists.

    ``map_distance`` is the quantization error of a map, the mean distance of an image to its best prototype, and
    ``topographic_error`` the share of images whose two best prototypes are no neighbours; both by the map's distance.
    """
    quality, counts, of_codes, of_classes = ImageQuality(), CodeCounts(), LabelCounts(), LabelCounts()
    quantizer, images, distance, torn = model.quantizer, 0, 0.0, 0
    for batch in batches:
        found = model.infer(batch.pixels.to(device))
        images += len(batch.keys)
        if found.reconstruction is not None:
            quality.add(found.images, found.reconstruction)
        if found.logits is not None:
            of_classes.add(found.logits.argmax(dim=1), batch.labels)
        if quantizer.codes:
            nearest = quantizer.distances(found.latents.float()).topk(2, dim=1, largest=False)
            codes, second = nearest.indices.unbind(dim=1)
            counts.add(codes.bincount(minlength=quantizer.codes).unsqueeze(0))
            of_codes.add(codes, batch.labels)
            distance += float(nearest.values[:, 0].double().sum())
            torn += int((~quantizer.are_neighbours(codes, second)).sum())
    metrics: dict[str, Any] = quality.compute() if quality.images else {}
    if model.head is not None:
        metrics |= classification_scores(of_classes.table(model.head.out_features))
    if quantizer.codes:
        table = of_codes.table(quantizer.codes)
        if table.numel():
            metrics |= {"purity": purity(table), "nmi": normalised_mutual_information(table)}
            metrics["label_counts"] = table.tolist()
        metrics |= counts.compute() | {"map_distance": distance / images, "topographic_error": torn / images}
        metrics["grid_correlation"] = grid_correlation(quantizer.codebook()[0].cpu(), quantizer.grid_distance().cpu())
    metrics |= {"samples": images, "tokens": images}
    return metrics, counts.counts.long().tolist() if quantizer.codes else []


def purity(table: Tensor) -> float:
    """Share of images that have the most frequent label of their code; counts ``(codes, labels)``."""
    return int(table.max(dim=1).values.sum()) / int(table.sum())


def normalised_mutual_information(table: Tensor) -> float:
    """I(code; label) / mean of H(code) and H(label); counts ``(codes, labels)``. 1 where neither varies."""
    joint = table.double() / table.sum()
    of_codes, of_labels = joint.sum(dim=1), joint.sum(dim=0)
    mean = (_entropy(of_codes) + _entropy(of_labels)) / 2
    if not mean:
        return 1.0
    return max(0.0, (_entropy(of_codes) + _entropy(of_labels) - _entropy(joint)) / mean)


def _entropy(shares: Tensor) -> float:
    """In nats."""
    return float(torch.special.entr(shares).sum())


def classification_scores(table: Tensor) -> dict[str, float]:
    """``class_accuracy``, and means over classes of precision, recall and F1 (``macro_…``); counts
    ``(predicted, labels)``, empty for none of them.

    A class for which one can't be told, such as the precision of one that is never predicted, is left out of its mean,
    as scikit-learn does with ``zero_division=nan``.
    """
    if not int(table.sum()):
        return {}
    classes = max(table.shape)
    square = torch.zeros(classes, classes, dtype=torch.float64)
    square[: table.shape[0], : table.shape[1]] = table
    right, predicted, real = square.diag(), square.sum(dim=1), square.sum(dim=0)
    return {
        "class_accuracy": float(right.sum() / square.sum()),
        "macro_precision": float((right / predicted).nanmean()),
        "macro_recall": float((right / real).nanmean()),
        "macro_f1": float((2 * right / (predicted + real)).nanmean()),
    }
