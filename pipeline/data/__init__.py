"""From a prepared data set to the micro-batches of a rank. Names are loaded when first used (design rule 8)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.collation import ImageBatch, ImageCollation, SpeechBatch, SpeechCollation
    from pipeline.data.config import BatchConfig, DataConfig
    from pipeline.data.dataset import ShardedDataset
    from pipeline.data.loader import build_loader, epoch_batches
    from pipeline.data.manifest import Manifest, ManifestError, read_manifest
    from pipeline.data.masking import MaskingConfig
    from pipeline.data.plan import SampleReference, SamplingPlan
    from pipeline.data.randomness import sample_generator

__all__ = [
    "ShardedDataset",
    "SamplingPlan",
    "SampleReference",
    "build_loader",
    "epoch_batches",
    "SpeechCollation",
    "ImageCollation",
    "SpeechBatch",
    "ImageBatch",
    "BatchConfig",
    "DataConfig",
    "MaskingConfig",
    "Manifest",
    "ManifestError",
    "read_manifest",
    "sample_generator",
]

_HOME = {
    "ShardedDataset": "dataset",
    "SamplingPlan": "plan",
    "SampleReference": "plan",
    "build_loader": "loader",
    "epoch_batches": "loader",
    "SpeechCollation": "collation",
    "ImageCollation": "collation",
    "SpeechBatch": "collation",
    "ImageBatch": "collation",
    "BatchConfig": "config",
    "DataConfig": "config",
    "MaskingConfig": "masking",
    "Manifest": "manifest",
    "ManifestError": "manifest",
    "read_manifest": "manifest",
    "sample_generator": "randomness",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
