"""Data sets as the sampling plan sees them: shards of samples that have a length and no content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.config import SAMPLE_RATE
from pipeline.data.lengths import length_histogram, stack_histograms


@dataclass
class PlannedShards:
    """Shards of these lengths, audio samples or pixels, ``(samples,)`` each."""

    lengths: list[np.ndarray]
    kind: str = "speech"
    split: str = "train"

    @property
    def sources(self) -> list[PlannedShards]:
        return [self]

    @property
    def weights(self) -> list[float]:
        return [1.0]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"|".join(each.tobytes() for each in self.lengths)).hexdigest()[:16]

    @cached_property
    def shard_starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([len(each) for each in self.lengths])]).astype(np.int64)

    @cached_property
    def length_table(self) -> np.ndarray:
        return stack_histograms([length_histogram(each).tolist() for each in self.lengths])

    def shard_lengths(self, shard: int) -> np.ndarray:
        return self.lengths[shard]

    def expect(self, shards: Sequence[int]) -> None:
        pass

    def length(self, index: int) -> int:
        """Of one sample, for tests."""
        return int(np.concatenate(self.lengths)[index])

    def shard_of(self, index: int) -> int:
        """The shard that a sample is in, for tests."""
        return int(np.searchsorted(self.shard_starts, index, side="right")) - 1


@dataclass
class PlannedMixture:
    """Several of them with weights."""

    sources: list[PlannedShards]
    weights: list[float]

    @property
    def kind(self) -> str:
        return self.sources[0].kind


def speech(shards: list[list[float]]) -> PlannedShards:
    """Clips of so many seconds."""
    return PlannedShards([(np.array(seconds) * SAMPLE_RATE).astype(np.int64) for seconds in shards])


def images(shards: list[int]) -> PlannedShards:
    """So many images a shard."""
    return PlannedShards([np.full(count, 64 * 64, dtype=np.int64) for count in shards], "image")
