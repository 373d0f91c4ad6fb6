"""The sampling plan: which samples are in micro-batch ``b`` of step ``t`` (design rule 1).

In: a data set or a mixture of several, a batch configuration, a seed. Out: sample references. A pure function: no state
but what it has computed before, no rank, no world size. Step ``t`` takes the numbers ``t·B … t·B+B-1`` of one endless
sequence of micro-batches; so resuming is knowing ``t``. Each number is the turn of one data set
(:mod:`pipeline.data.mixing`), which has its own endless sequence (:mod:`pipeline.data.stream`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.data.config import MIX_TURNS, BatchConfig, DataConfig
from pipeline.data.mixing import Turns
from pipeline.data.stream import ImageStream, SampleReference, Shards, SpeechStream, Stream

PLAN_VERSION = 2  # raised when the same data, configuration and seed would give other micro-batches than before


class Sources(Protocol):
    """What the plan needs to know of the data: a :class:`ShardedDataset` or a :class:`Mixture` has it."""

    @property
    def kind(self) -> str: ...

    @property
    def sources(self) -> Sequence[Shards]: ...

    @property
    def weights(self) -> Sequence[float]: ...


class SamplingPlan:
    """The endless sequence of micro-batches of one data set or mixture, batch configuration and seed.

    Attributes: ``streams``, one a data set; ``samples`` planned, ``skipped`` (clips shorter than ``data.min_seconds``),
    over all of them; ``description``, everything that decides the plan, and ``fingerprint``, its hash.

    Raises ``ValueError`` if nothing is left to plan, or the longest clip does not fit into a micro-batch.
    """

    def __init__(self, dataset: Sources, batch: BatchConfig, data: DataConfig, seed: int) -> None:
        self.batch = batch
        self.data = data
        self.seed = seed
        self.kind = dataset.kind
        kind = SpeechStream if dataset.kind == "speech" else ImageStream
        self.streams: list[Stream] = [
            kind(shards, batch, data, seed, source) for source, shards in enumerate(dataset.sources)
        ]
        self.samples = sum(stream.samples for stream in self.streams)
        self.skipped = sum(stream.skipped for stream in self.streams)
        self._turns = Turns(dataset.weights)
        self.description = self._describe(dataset)
        text = json.dumps(self.description, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def _describe(self, dataset: Sources) -> dict[str, Any]:
        """What decides the plan, flat, by the recipe's keys where there is one."""
        names = ["micro_batches", "seconds" if self.kind == "speech" else "samples"]
        values: dict[str, Any] = {"plan": PLAN_VERSION, "seed": self.seed}
        values |= {f"batch.{name}": getattr(self.batch, name) for name in names}
        names = ["shuffle", "window_shards"]
        if self.kind == "speech":
            names += ["min_seconds", "max_seconds", "bucket_seconds"]
        values |= {f"data.{name}": getattr(self.data, name) for name in names}
        for place, (shards, weight) in enumerate(zip(dataset.sources, dataset.weights, strict=True)):
            key = f"data.mix.{place}" if len(self.streams) > 1 else "data"
            values |= {f"{key}.weight": weight} if len(self.streams) > 1 else {}
            values |= {
                f"{key}.kind": shards.kind,
                f"{key}.split": shards.split,
                f"{key}.samples": int(shards.shard_starts[-1]),
                f"{key}.shards": len(shards.shard_starts) - 1,
                f"{key}.content": shards.fingerprint,
            }
        return values

    @property
    def shares(self) -> list[float]:
        """Of the micro-batches, each data set's: the weights over their sum, in steps of a turn."""
        return (self._turns.shares / MIX_TURNS).tolist()

    def changes_since(self, description: Mapping[str, Any]) -> list[str]:
        """What differs from an earlier plan's description, one line each: ``data.samples 1000 → 990``."""
        keys = [*description, *(key for key in self.description if key not in description)]
        pairs = [(key, description.get(key, "none"), self.description.get(key, "none")) for key in keys]
        return [f"{key} {old} → {new}" for key, old, new in pairs if old != new]

    @property
    def micro_batches_per_epoch(self) -> float:
        """Micro-batches in which as many samples are dealt as there are. Later epochs of speech have a few more or
        less; of a mixture, some data sets are through more than once by then and others are not."""
        streams = zip(self.shares, self.streams, strict=True)
        return self.samples / sum(share * stream.samples / stream.epoch_micro_batches for share, stream in streams)

    @property
    def steps_per_epoch(self) -> float:
        """Optimiser steps in an epoch; a step may straddle two."""
        return self.micro_batches_per_epoch / self.batch.micro_batches

    @property
    def padding_share(self) -> float:
        """Upper bound of the share of padding in speech tensors; 0 for images."""
        return sum(share * stream.padding_share for share, stream in zip(self.shares, self.streams, strict=True))

    def epochs(self, step: int) -> list[float]:
        """Epochs of each data set that are over when ``step`` begins."""
        reached = self._turns.reached(step * self.batch.micro_batches)
        return [stream.epoch(number) for stream, number in zip(self.streams, reached, strict=True)]

    def epoch(self, step: int) -> float:
        """Epochs that are over when ``step`` begins: samples dealt over samples there are."""
        through = zip(self.streams, self.epochs(step), strict=True)
        return sum(stream.samples * epochs for stream, epochs in through) / self.samples

    def micro_batch(self, step: int, b: int) -> list[SampleReference]:
        """The samples of micro-batch ``b`` of ``step``; the same on every rank and after any restart."""
        if not 0 <= b < self.batch.micro_batches:
            last = self.batch.micro_batches - 1
            raise ValueError(f"micro-batch {b} is not in a step of {last + 1}: use 0 to {last}")
        source, number = self._turns.place(step * self.batch.micro_batches + b)
        return self.streams[source].micro_batch(number)

    def replacement(self, failed: SampleReference, attempt: int) -> SampleReference | None:
        """Who stands in for a sample that can't be decoded, see :meth:`Stream.replacement`; None when no other is
        left to try.
        """
        return self.streams[failed.source].replacement(failed, attempt)
