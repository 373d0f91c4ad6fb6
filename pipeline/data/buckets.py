"""How clips of about the same length share micro-batches: the buckets, and how many micro-batches they make.

In: length histograms (:mod:`pipeline.data.lengths`), the configuration of lengths and micro-batches. Out: clips by
bucket, and where the *slots*, places for clips sorted by bucket, are cut into micro-batches. Pure.
"""

from __future__ import annotations

import numpy as np

from pipeline.data.config import LENGTH_BIN, SAMPLE_RATE, DataConfig

_ROWS = 4096  # of a length table, read at a time


class Buckets:
    """Clips of at least ``data.min_seconds``, cropped to ``data.max_seconds``, in steps of ``data.bucket_seconds``.

    Attributes: ``padded`` int64 ``(buckets,)``, audio samples that no clip of a bucket exceeds; ``capacities`` int64
    ``(buckets,)``, how many of them fit into ``seconds`` of a micro-batch.

    ``bins`` is how many the length histograms have: the last clip is no longer than they reach. Raises ``ValueError``
    if the longest clip does not fit.
    """

    def __init__(self, data: DataConfig, seconds: float, bins: int) -> None:
        self.first_bin = data.min_samples // LENGTH_BIN
        self._bins_each = round(data.bucket_seconds * SAMPLE_RATE / LENGTH_BIN)
        self._max_samples = data.max_samples
        width = self._bins_each * LENGTH_BIN
        longest = min(data.max_samples, bins * LENGTH_BIN)
        self._first = self.first_bin // self._bins_each
        top = max(self._first, -(-longest // width) - 1)
        numbers = np.arange(self._first, top + 1)
        self._first_bins = np.maximum(numbers * self._bins_each, self.first_bin)
        self.padded = np.minimum((numbers + 1) * width, longest)
        cap = int(seconds * SAMPLE_RATE)
        if longest > cap:
            raise ValueError(
                f"batch.seconds={seconds} is less than the longest clip of {longest / SAMPLE_RATE:.2f} s: "
                f"use batch.seconds={longest / SAMPLE_RATE:.2f} or more, or crop with data.max_seconds={seconds}"
            )
        self.capacities = cap // self.padded

    def count(self, table: np.ndarray) -> np.ndarray:
        """Clips of each shard by bucket, uint32 ``(shards, buckets)``, of a length table ``(shards, bins)``."""
        parts = range(0, len(table), _ROWS)
        return np.concatenate([np.add.reduceat(table[row : row + _ROWS], self._first_bins, axis=1) for row in parts])

    def sort(self, lengths: np.ndarray) -> np.ndarray:
        """The bucket of each clip, int64 ``(clips,)``, -1 for one that is too short; lengths in audio samples."""
        bins = lengths // LENGTH_BIN
        bucket = np.minimum(bins // self._bins_each - self._first, len(self.padded) - 1)
        return np.where(bins < self.first_bin, -1, bucket)

    def least_seconds(self, histogram: np.ndarray) -> float:
        """Lower bound of the seconds that these clips ``(bins,)`` have when cropped."""
        bins = np.arange(self.first_bin, len(histogram))
        return float(histogram[self.first_bin :] @ np.minimum(bins * LENGTH_BIN, self._max_samples)) / SAMPLE_RATE


def cut_slots(counts: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Where micro-batches begin among the slots, and the end of the last one: int64 ``(micro-batches + 1,)``.

    Each takes slots, shortest bucket first, as long as all of them padded to the longest fit: ``counts`` ``(buckets,)``
    slots of each bucket, ``capacities`` how many fit. Leftovers of a bucket go with clips of the next.
    """
    cuts, begin, slot = [0], 0, 0
    for count, capacity in zip(counts.tolist(), capacities.tolist(), strict=True):
        if not count:
            continue
        if slot - begin >= capacity:
            cuts.append(slot)  # full for the longer clips that come
            begin = slot
        slot += count
        while slot - begin > capacity:
            begin += capacity
            cuts.append(begin)
    if slot > begin:
        cuts.append(slot)
    return np.array(cuts, dtype=np.int64)


def count_micro_batches(
    counts: np.ndarray, padded: np.ndarray, capacities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """How many micro-batches :func:`cut_slots` makes of each window, and their padded audio samples: int64
    ``(windows,)`` both, of ``counts`` ``(windows, buckets)``. All windows at once, without cutting any.
    """
    windows = len(counts)
    made: np.ndarray = np.zeros(windows, dtype=np.int64)
    total, open_slots, open_padded = made.copy(), made.copy(), made.copy()
    for bucket, (length, capacity) in enumerate(zip(padded.tolist(), capacities.tolist(), strict=True)):
        count = counts[:, bucket].astype(np.int64)
        closed = (count > 0) & (open_slots >= capacity)
        made += closed
        total += np.where(closed, open_slots * open_padded, 0)
        open_slots = np.where(closed, 0, open_slots) + count
        full = np.where(count > 0, (open_slots - 1) // capacity, 0)
        made += full
        total += full * capacity * length
        open_slots -= full * capacity
        open_padded = np.where(count > 0, length, open_padded)
    return made + (open_slots > 0), total + open_slots * open_padded
