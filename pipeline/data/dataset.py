"""A prepared data set as a sequence of samples with random access.

In: a data set folder and a split. Out: encoded bytes and metadata of sample ``i``. Opens shards for reading and nothing
else; one ``pread`` a sample, so any number of threads can read at once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.index import ShardError, read_index
from pipeline.data.manifest import ManifestError, read_manifest


class Member(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    content: bytes  # the FLAC, WAV, JPEG or PNG file
    metadata: dict[str, Any]  # KEY.json


class ShardedDataset:
    """The samples of one split, in the order of the shards; ``len()``, ``.lengths``, ``.keys(i)`` and ``.read(i)``.

    Attributes: ``manifest``; ``kind`` "speech" or "image"; ``fingerprint``, a name of the content and the split;
    ``lengths`` int64 ``(samples,)``: audio samples at 16 kHz, or pixels; ``labels`` int32 ``(samples,)``: places in
    ``manifest.classes``, or -1.

    Raises :class:`ManifestError` if the folder or the split does not exist, :class:`ShardError` if an index can't be
    read.
    """

    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path = Path(path)
        self.split = split
        self.manifest = read_manifest(self.path)
        if split not in self.manifest.splits:
            splits = ", ".join(sorted(self.manifest.splits))
            raise ManifestError(f"{self.path} has no split {split!r}: use {splits}")
        shards = self.manifest.splits[split].shards
        if not shards:
            raise ManifestError(f"split {split!r} of {self.path} is empty: give it a larger share when preparing")
        self.kind = self.manifest.kind
        self.fingerprint = self.manifest.fingerprint(split)
        self._shards = [self.path / shard.file for shard in shards]
        indexes = [read_index(self.path / shard.index_file) for shard in shards]
        for shard, index in zip(shards, indexes, strict=True):
            if len(index.keys) != shard.samples:
                raise ShardError(
                    f"{self.path / shard.index_file} holds {len(index.keys)} samples, the manifest says "
                    f"{shard.samples}: run `tessera verify {self.path}`"
                )
        self._records = np.concatenate([index.records for index in indexes])
        self._keys = [key for index in indexes for key in index.keys]
        self._shard_of = np.repeat(np.arange(len(shards)), [len(index.keys) for index in indexes])
        self.lengths: np.ndarray = self._records["length"].astype(np.int64)
        self.labels: np.ndarray = self._records["label"].astype(np.int32)
        self._descriptors: dict[int, int] = {}
        self._opening = Lock()

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self, index: int) -> str:
        """The key of sample ``index``."""
        return self._keys[index]

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index`` in pixels; (0, 0) for speech."""
        record = self._records[index]
        return int(record["width"]), int(record["height"])

    def read(self, index: int) -> Member:
        """Bytes and metadata of sample ``index``; raises :class:`ShardError` if the shard is missing or too short."""
        record = self._records[index]
        offset, end = int(record["offset"]), int(record["json_offset"] + record["json_size"])
        shard = int(self._shard_of[index])
        block = os.pread(self._descriptor(shard), end - offset, offset)
        if len(block) != end - offset:
            raise ShardError(f"{self._shards[shard]} ends before sample {self._keys[index]}: it was cut short")
        content = block[: record["size"]]
        metadata = json.loads(block[int(record["json_offset"]) - offset :])
        return Member(self._keys[index], content, metadata)

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            with self._opening:
                descriptor = self._descriptors.get(shard)
                if descriptor is None:
                    try:
                        descriptor = os.open(self._shards[shard], os.O_RDONLY)
                    except FileNotFoundError:
                        raise ShardError(
                            f"{self._shards[shard]} is missing: run `tessera verify {self.path}`"
                        ) from None
                    self._descriptors[shard] = descriptor
        return descriptor

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        with self._opening:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def __del__(self) -> None:
        if hasattr(self, "_opening"):
            self.close()
