"""The sampling plan: which samples are in micro-batch ``b`` of step ``t`` (design rule 1).

In: a data set's lengths and fingerprint, a batch configuration, a seed. Out: sample references. A pure function: no
state but cached permutations, no files, no rank, no world size. Step ``t`` takes the numbers ``t·B … t·B+B-1`` of one
endless sequence of micro-batches, in which epoch follows epoch; so resuming is knowing ``t``.

Speech: the clips' lengths, cropped and rounded up to a multiple of ``data.bucket_seconds``, are sorted into *slots*,
and the slots are cut into micro-batches whose padded length stays below ``batch.seconds``. That is done once, so every
epoch has as many micro-batches as the first. Each epoch deals the clips of a bucket anew to the bucket's slots, and
shuffles the micro-batches.

Images: an endless stream of epoch permutations, ``batch.samples`` at a time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from pipeline.data.config import SAMPLE_RATE, BatchConfig, DataConfig
from pipeline.data.randomness import sample_generator

_CACHED_EPOCHS = 3


@dataclass(frozen=True, slots=True)
class SampleReference:
    """A sample's turn: which one, in which epoch, and how much of it."""

    index: int
    epoch: int
    limit: int = 0  # speech: crop to so many audio samples; 0 takes everything


class Lengths(Protocol):
    """What the plan needs to know of a data set; :class:`ShardedDataset` has it."""

    @property
    def kind(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    lengths: np.ndarray


class SamplingPlan:
    """The endless sequence of micro-batches of one data set, batch configuration and seed.

    Attributes: ``micro_batches_per_epoch`` (for images it may be a fraction: micro-batches straddle epochs),
    ``steps_per_epoch``, ``samples`` planned, ``skipped`` (clips shorter than ``data.min_seconds``), ``fingerprint`` of
    everything that decides the plan.

    Raises ``ValueError`` if nothing is left to plan, or the longest clip does not fit into a micro-batch.
    """

    def __init__(self, dataset: Lengths, batch: BatchConfig, data: DataConfig, seed: int) -> None:
        self.batch = batch
        self.data = data
        self.seed = seed
        self.kind = dataset.kind
        if dataset.kind == "speech":
            if batch.seconds is None:
                raise ValueError("batch.seconds is missing: a speech data set's micro-batches are sized in seconds")
            self._lengths = np.minimum(dataset.lengths, data.max_samples)
            kept = np.flatnonzero(dataset.lengths >= data.min_samples)
            settings = f"{batch.seconds} {data.min_seconds} {data.max_seconds} {data.bucket_seconds}"
        else:
            if batch.samples is None:
                raise ValueError("batch.samples is missing: an image data set's micro-batches are sized in samples")
            kept = np.arange(len(dataset.lengths))
            settings = f"{batch.samples}"
        self.samples = len(kept)
        self.skipped = len(dataset.lengths) - len(kept)
        if not self.samples:
            raise ValueError(
                f"no sample is left to train on: all {self.skipped} clips are shorter than "
                f"data.min_seconds={data.min_seconds}"
            )
        if dataset.kind == "speech":
            self._deal_slots(kept, batch.seconds or 0.0, data)
            self.micro_batches_per_epoch = float(len(self._starts))
        else:
            self._size = batch.samples or 1
            self.micro_batches_per_epoch = self.samples / self._size
        text = f"{dataset.fingerprint} {dataset.kind} {batch.micro_batches} {settings} {seed}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._orders: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._ordering = Lock()  # replacements are asked for by decoding threads

    def _deal_slots(self, kept: np.ndarray, seconds: float, data: DataConfig) -> None:
        """Sort the clips into slots and cut the slots into micro-batches."""
        lengths = self._lengths[kept]
        cap = int(seconds * SAMPLE_RATE)
        longest = int(lengths.max())
        if longest > cap:
            raise ValueError(
                f"batch.seconds={seconds} is less than the longest clip of {longest / SAMPLE_RATE:.2f} s: "
                f"use batch.seconds={longest / SAMPLE_RATE:.2f} or more, or crop with data.max_seconds={seconds}"
            )
        width = max(1, round(data.bucket_seconds * SAMPLE_RATE))
        # The longest bucket is padded to the longest clip, not to the next multiple, which might not fit the cap.
        rounded = np.minimum(-(-lengths // width) * width, longest)
        order = np.lexsort((kept, rounded))
        self._slots = kept[order]  # (samples,) index of the data set, shortest bucket first
        slot_lengths = rounded[order]
        self._bucket_starts = np.flatnonzero(np.diff(slot_lengths, prepend=-1))
        starts, first = [0], 0
        for slot, length in enumerate(slot_lengths.tolist()):
            if (slot - first + 1) * length > cap:
                starts.append(slot)
                first = slot
        self._starts = np.array(starts)
        self._ends = np.append(self._starts[1:], self.samples)
        self._padded_samples = int(((self._ends - self._starts) * slot_lengths[self._ends - 1]).sum())

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps in an epoch; a step may straddle two."""
        return self.micro_batches_per_epoch / self.batch.micro_batches

    @property
    def padding_share(self) -> float:
        """Upper bound of the share of padding in an epoch's speech tensors; 0 for images."""
        if self.kind != "speech":
            return 0.0
        return 1.0 - float(self._lengths[self._slots].sum()) / self._padded_samples

    def epoch(self, step: int) -> float:
        """Epochs that are over when ``step`` begins."""
        return step / self.steps_per_epoch

    def micro_batch(self, step: int, b: int) -> list[SampleReference]:
        """The samples of micro-batch ``b`` of ``step``; the same on every rank and after any restart."""
        if not 0 <= b < self.batch.micro_batches:
            last = self.batch.micro_batches - 1
            raise ValueError(f"micro-batch {b} is not in a step of {last + 1}: use 0 to {last}")
        number = step * self.batch.micro_batches + b
        if self.kind == "speech":
            epoch, place = divmod(number, len(self._starts))
            clips, turn = self._order(epoch)
            cut = turn[place]
            indexes = clips[self._starts[cut] : self._ends[cut]]
            return [self._reference(int(index), epoch) for index in indexes]
        references = []
        for position in range(number * self._size, (number + 1) * self._size):
            epoch, place = divmod(position, self.samples)
            references.append(SampleReference(int(self._order(epoch)[0][place]), epoch))
        return references

    def replacement(self, failed: SampleReference, attempt: int) -> SampleReference:
        """Who stands in for a sample that can't be decoded: the one ``attempt`` places on in the epoch's order,
        wrapping round.

        A longer clip is cropped to the length of the one that it replaces, so the micro-batch keeps its shape's bound.
        """
        clips, _ = self._order(failed.epoch)
        place = int(np.flatnonzero(clips == failed.index)[0])
        index = int(clips[(place + attempt) % self.samples])
        if self.kind != "speech":
            return SampleReference(index, failed.epoch)
        return SampleReference(index, failed.epoch, int(min(self._lengths[index], self._lengths[failed.index])))

    def _reference(self, index: int, epoch: int) -> SampleReference:
        return SampleReference(index, epoch, int(self._lengths[index]))

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's clips in slot order, and the order of its micro-batches; cached, as neighbours ask for the
        same.
        """
        with self._ordering:
            if epoch not in self._orders:
                self._orders[epoch] = self._draw_order(epoch)
                while len(self._orders) > _CACHED_EPOCHS:
                    self._orders.popitem(last=False)
            return self._orders[epoch]

    def _draw_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        generator = sample_generator(self.seed, epoch, 0, "order")
        if self.kind == "speech":
            clips = self._slots.copy()
            for bucket in np.split(clips, self._bucket_starts[1:]):  # views of clips
                generator.shuffle(bucket)
            return clips, generator.permutation(len(self._starts))
        return generator.permutation(self.samples), np.zeros(0, dtype=np.int64)
