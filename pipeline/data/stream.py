"""The endless sequence of micro-batches of one data set: epoch follows epoch, and each takes every sample once.

In: a data set's shards, a configuration, a seed. Out: sample references of micro-batch ``n``. Knows nothing of steps,
ranks or other data sets. Holds what grows with the number of shards, and the samples of a few windows.

Images: the samples of each window permuted, ``batch.samples`` at a time; micro-batches run over the borders of windows
and epochs.

Speech: a window's clips, cropped, are sorted into *buckets* of ``data.bucket_seconds``, and their places, the *slots*,
are cut into micro-batches whose padded length stays below ``batch.seconds``. How many clips each bucket has is known
from the shards' length histograms, so any epoch's micro-batches are counted without reading an index. Then the clips
of each bucket are dealt to its slots, and the window's micro-batches are permuted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.data.buckets import Buckets, count_micro_batches, cut_slots
from pipeline.data.config import SAMPLE_RATE, BatchConfig, DataConfig
from pipeline.data.index import ShardError
from pipeline.data.randomness import sample_generator
from pipeline.data.windows import CACHED_EPOCHS, ShardWindows

_CACHED_WINDOWS = 3  # a step may straddle two


@dataclass(frozen=True, slots=True)
class SampleReference:
    """A sample's turn: which one, in which epoch, how much of it, and of which data set of a mixture."""

    index: int
    epoch: int
    limit: int = 0  # speech: crop to so many audio samples; 0 takes everything
    source: int = 0


class Shards(Protocol):
    """What a stream needs to know of a data set; :class:`ShardedDataset` has it."""

    @property
    def kind(self) -> str: ...

    @property
    def split(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def shard_starts(self) -> np.ndarray: ...

    @property
    def length_table(self) -> np.ndarray: ...

    def shard_lengths(self, shard: int) -> np.ndarray: ...

    def expect(self, shards: Sequence[int]) -> None: ...


class Window(NamedTuple):
    """The samples of one window in their drawn order."""

    samples: np.ndarray  # (samples,) int64, numbers in the data set
    limits: np.ndarray  # (samples,) int64 crops in audio samples; zeros for images
    cuts: np.ndarray  # (micro-batches + 1,) int64 where speech micro-batches begin; empty for images


class Stream(ABC):
    """The micro-batches of one data set.

    Attributes: ``samples`` an epoch has, ``skipped`` (clips shorter than ``data.min_seconds``), ``epoch_micro_batches``
    of the first epoch; of later ones there may be a few more or less. For images it may be a fraction.
    """

    samples: int
    skipped: int = 0
    epoch_micro_batches: float

    def __init__(self, shards: Shards, data: DataConfig, seed: int, source: int) -> None:
        count = len(shards.shard_starts) - 1
        self.windows = ShardWindows(count, count if data.shuffle == "full" else data.window_shards, seed, source)
        self._shards = shards
        self._seed = seed
        self._source = source
        self._drawn: OrderedDict[tuple[int, int], Window] = OrderedDict()
        self._drawing = RLock()  # decoding threads ask for micro-batches and replacements

    @abstractmethod
    def micro_batch(self, number: int) -> list[SampleReference]:
        """The samples of micro-batch ``number``, counted from the first epoch's first."""

    @abstractmethod
    def epoch(self, number: int) -> float:
        """Epochs that are over when micro-batch ``number`` begins."""

    @property
    def padding_share(self) -> float:
        """Upper bound of the share of padding in the first epoch's tensors; 0 for images."""
        return 0.0

    def replacement(self, failed: SampleReference, attempt: int) -> SampleReference | None:
        """Who stands in for a sample that can't be decoded: the one ``attempt`` places on in the order of its window,
        wrapping round; None when all others of the window have been tried.

        A longer clip is cropped to the length of the one that it replaces, so the micro-batch keeps its shape's bound.
        """
        shard = int(np.searchsorted(self._shards.shard_starts, failed.index, side="right")) - 1
        window = self._window(failed.epoch, self.windows.holding(failed.epoch, shard))
        if attempt >= len(window.samples):
            return None
        place = int(np.flatnonzero(window.samples == failed.index)[0])
        other = (place + attempt) % len(window.samples)
        limit = int(min(window.limits[place], window.limits[other]))
        return SampleReference(int(window.samples[other]), failed.epoch, limit, self._source)

    def _references(self, window: Window, first: int, end: int, epoch: int) -> list[SampleReference]:
        samples, limits = window.samples[first:end].tolist(), window.limits[first:end].tolist()
        pairs = zip(samples, limits, strict=True)
        return [SampleReference(sample, epoch, limit, self._source) for sample, limit in pairs]

    def _window(self, epoch: int, number: int) -> Window:
        with self._drawing:
            window = self._drawn.get((epoch, number))
            if window is None:
                self._shards.expect(self.windows.shards(epoch, number).tolist())
                generator = sample_generator(self._seed, epoch, number, "window", self._source)
                window = self._draw(self.windows.shards(epoch, number), generator)
                self._drawn[epoch, number] = window
                while len(self._drawn) > _CACHED_WINDOWS:
                    self._drawn.popitem(last=False)
                self._shards.expect(self.windows.following(epoch, number).tolist())
            return window

    @abstractmethod
    def _draw(self, shards: np.ndarray, generator: np.random.Generator) -> Window:
        """Shuffle the samples of these shards."""

    def _samples_of(self, shards: np.ndarray) -> np.ndarray:
        """The numbers of all samples of some shards, int64 ``(samples,)``."""
        starts = self._shards.shard_starts
        return np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])


class ImageStream(Stream):
    """Micro-batches of ``batch.samples`` images."""

    def __init__(self, shards: Shards, batch: BatchConfig, data: DataConfig, seed: int, source: int) -> None:
        super().__init__(shards, data, seed, source)
        if batch.samples is None:
            raise ValueError("batch.samples is missing: an image data set's micro-batches are sized in samples")
        self.samples = int(shards.shard_starts[-1])
        self._size = batch.samples
        self.epoch_micro_batches = self.samples / self._size
        self._window_starts = lru_cache(maxsize=CACHED_EPOCHS)(self._count_windows)

    def epoch(self, number: int) -> float:
        return number * self._size / self.samples

    def micro_batch(self, number: int) -> list[SampleReference]:
        references: list[SampleReference] = []
        while len(references) < self._size:
            epoch, place = divmod(number * self._size + len(references), self.samples)
            starts = self._window_starts(epoch)
            window = int(np.searchsorted(starts, place, side="right")) - 1
            first = place - int(starts[window])
            end = min(first + self._size - len(references), int(starts[window + 1] - starts[window]))
            references += self._references(self._window(epoch, window), first, end, epoch)
        return references

    def _count_windows(self, epoch: int) -> np.ndarray:
        """Where in the epoch's stream of samples its windows begin, int64 ``(windows + 1,)``."""
        counts = np.diff(self._shards.shard_starts)[self.windows.order(epoch)]
        return np.concatenate([[0], np.cumsum(counts)])[self.windows.bounds]

    def _draw(self, shards: np.ndarray, generator: np.random.Generator) -> Window:
        samples = generator.permutation(self._samples_of(shards))
        return Window(samples, np.zeros(len(samples), dtype=np.int64), np.zeros(0, dtype=np.int64))


class SpeechStream(Stream):
    """Micro-batches of clips of about the same length, below ``batch.seconds`` padded.

    Raises ``ValueError`` if no clip is long enough, or the longest does not fit into a micro-batch.
    """

    def __init__(self, shards: Shards, batch: BatchConfig, data: DataConfig, seed: int, source: int) -> None:
        super().__init__(shards, data, seed, source)
        if batch.seconds is None:
            raise ValueError("batch.seconds is missing: a speech data set's micro-batches are sized in seconds")
        self._buckets = Buckets(data, batch.seconds, shards.length_table.shape[1])
        self._max_samples = data.max_samples
        total = int(shards.shard_starts[-1])
        longest_bin = shards.length_table.shape[1] - 1
        if longest_bin < self._buckets.first_bin:
            raise ValueError(
                f"no sample is left to train on: all {total} clips are shorter than data.min_seconds={data.min_seconds}"
            )
        self._counts = self._buckets.count(shards.length_table)  # (shards, buckets)
        self.samples = int(self._counts.sum(dtype=np.int64))
        self.skipped = total - self.samples
        self._epoch_ends: list[int] = []  # in the endless sequence, of each epoch as far as was asked
        self._window_ends = lru_cache(maxsize=CACHED_EPOCHS)(self._count_windows)
        self.epoch_micro_batches = float(self._window_ends(0)[-1])

    @property
    def padding_share(self) -> float:
        _, padded = count_micro_batches(self._window_counts(0), self._buckets.padded, self._buckets.capacities)
        histogram = self._shards.length_table.sum(axis=0, dtype=np.int64)
        return 1.0 - self._buckets.least_seconds(histogram) * SAMPLE_RATE / int(padded.sum())

    def epoch(self, number: int) -> float:
        with self._drawing:
            epoch, place = self._place(number)
            return epoch + place / int(self._window_ends(epoch)[-1])

    def micro_batch(self, number: int) -> list[SampleReference]:
        with self._drawing:
            epoch, place = self._place(number)
            ends = self._window_ends(epoch)
            window = int(np.searchsorted(ends, place, side="right"))
            turn = place - (int(ends[window - 1]) if window else 0)
            drawn = self._window(epoch, window)
            return self._references(drawn, int(drawn.cuts[turn]), int(drawn.cuts[turn + 1]), epoch)

    def _place(self, number: int) -> tuple[int, int]:
        """The epoch of a micro-batch, and its number there."""
        if len(self.windows) == 1:  # every epoch has the same slots
            return divmod(number, int(self._window_ends(0)[-1]))
        while not self._epoch_ends or self._epoch_ends[-1] <= number:
            before = self._epoch_ends[-1] if self._epoch_ends else 0
            self._epoch_ends.append(before + int(self._window_ends(len(self._epoch_ends))[-1]))
        epoch = bisect_right(self._epoch_ends, number)
        return epoch, number - (self._epoch_ends[epoch - 1] if epoch else 0)

    def _window_counts(self, epoch: int) -> np.ndarray:
        """Clips of an epoch's windows by bucket, int64 ``(windows, buckets)``."""
        in_order = self._counts[self.windows.order(epoch)]
        return np.add.reduceat(in_order, self.windows.bounds[:-1], axis=0, dtype=np.int64)

    def _count_windows(self, epoch: int) -> np.ndarray:
        """Where in the epoch's micro-batches each window ends, int64 ``(windows,)``."""
        made, _ = count_micro_batches(self._window_counts(epoch), self._buckets.padded, self._buckets.capacities)
        return np.cumsum(made)

    def _draw(self, shards: np.ndarray, generator: np.random.Generator) -> Window:
        samples = self._samples_of(shards)
        lengths = np.concatenate([self._shards.shard_lengths(int(shard)) for shard in shards])
        buckets = self._buckets.sort(lengths)
        counts = np.bincount(buckets[buckets >= 0], minlength=len(self._buckets.padded))
        if (counts != self._counts[shards].sum(axis=0)).any():
            raise ShardError(
                f"the indexes of shards {', '.join(map(str, sorted(shards.tolist())))} of split {self._shards.split!r} "
                "hold clips of other lengths than lengths.npy counts: run `tessera verify` on the data set"
            )
        shuffled = generator.permutation(np.flatnonzero(buckets >= 0))
        slots = shuffled[np.argsort(buckets[shuffled], kind="stable")]  # dealt within each bucket
        cuts = cut_slots(counts, self._buckets.capacities)
        turns = generator.permutation(len(cuts) - 1)
        order = np.concatenate([slots[cuts[turn] : cuts[turn + 1]] for turn in turns])
        sizes = np.diff(cuts)[turns]
        limits = np.minimum(lengths[order], self._max_samples)
        return Window(samples[order], limits, np.concatenate([[0], np.cumsum(sizes)]))
