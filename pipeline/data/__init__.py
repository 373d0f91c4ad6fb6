"""From a prepared data set to the micro-batches of a rank. Names are loaded when first used (design rule 8)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.data.collation import ImageBatch, ImageCollation, SpeechBatch, SpeechCollation
    from pipeline.data.config import BatchConfig, DataConfig, MixedData
    from pipeline.data.dataset import ShardedDataset
    from pipeline.data.loader import build_loader, epoch_batches
    from pipeline.data.manifest import Manifest, ManifestError, read_manifest
    from pipeline.data.masking import MaskingConfig
    from pipeline.data.mixing import Mixture, open_data
    from pipeline.data.plan import SamplingPlan
    from pipeline.data.randomness import sample_generator
    from pipeline.data.stream import SampleReference

__all__ = [
    "ShardedDataset",
    "Mixture",
    "open_data",
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
    "MixedData",
    "MaskingConfig",
    "Manifest",
    "ManifestError",
    "read_manifest",
    "sample_generator",
]

_HOME = {
    "ShardedDataset": "dataset",
    "Mixture": "mixing",
    "open_data": "mixing",
    "SamplingPlan": "plan",
    "SampleReference": "stream",
    "build_loader": "loader",
    "epoch_batches": "loader",
    "SpeechCollation": "collation",
    "ImageCollation": "collation",
    "SpeechBatch": "collation",
    "ImageBatch": "collation",
    "BatchConfig": "config",
    "DataConfig": "config",
    "MixedData": "config",
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
