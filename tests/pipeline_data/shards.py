"""Data sets for tests: shards of samples that have a length and no content, as the sampling plan sees them, and real
ones with as many samples in each shard as a test wants.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.data import Manifest, ShardedDataset
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.index import RECORD, ShardIndex
from pipeline.data.lengths import length_histogram, stack_histograms, write_lengths
from pipeline.data.manifest import ShardEntry, SplitEntry, write_manifest
from pipeline.data.storage import open_folder


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


def reshard(source: ShardedDataset, folder: Path, sizes: Sequence[int]) -> Path:
    """A data set of the first samples of another, with so many in each shard."""
    (folder / "train").mkdir(parents=True)
    entries, histograms, first = [], [], 0
    for number, size in enumerate(sizes):
        buffer, records, keys = io.BytesIO(), [], []
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index in range(first, first + size):
                member = source.read(index)
                places = []
                for suffix, content in (("bin", member.content), ("json", member.description)):
                    header = tarfile.TarInfo(f"{member.key}.{suffix}")
                    header.size = len(content)
                    places += [buffer.tell() + tarfile.BLOCKSIZE, len(content)]
                    archive.addfile(header, io.BytesIO(content))
                records.append((*places, member.length, *source.size(index), member.label))
                keys.append(member.key)
        first += size
        lengths = np.array([record[4] for record in records], dtype=np.int64)
        histograms.append(length_histogram(lengths).tolist())
        content = ShardIndex(np.array(records, dtype=RECORD), keys).to_bytes()
        entry = ShardEntry(
            file=f"train/shard-{number:06d}.tar",
            sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
            bytes=len(buffer.getvalue()),
            index_sha256=hashlib.sha256(content).hexdigest(),
            samples=size,
        )
        (folder / entry.file).write_bytes(buffer.getvalue())
        (folder / entry.index_file).write_bytes(content)
        entries.append(entry)
    split = SplitEntry.of(entries)
    if source.kind == "speech":
        table, name = stack_histograms(histograms), "train/lengths.npy"
        split = SplitEntry.of(
            entries,
            lengths=table.sum(axis=0, dtype=int).tolist(),
            lengths_file=name,
            lengths_sha256=write_lengths(open_folder(folder), name, table),
        )
    write_manifest(folder, Manifest(kind=source.kind, classes=source.manifest.classes, splits={"train": split}))
    return folder
