"""A prepared data set as a sequence of samples with random access.

In: a data set folder, or its URL, and a split. Out: encoded bytes and metadata of sample ``i``. Knows of all samples
only where each shard's begin: a shard's index is read when a sample of it is first asked for, and few shards are kept
open. One ``pread`` a sample, so any number of threads can read at once. Remote shards are read from a cache of whole
files on this machine (:mod:`pipeline.data.cache`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.data.cache import RemoteFile, ShardCache
from pipeline.data.index import RECORD, ShardError, ShardIndex, parse_index
from pipeline.data.lengths import read_lengths
from pipeline.data.manifest import ManifestError, ShardEntry, read_manifest
from pipeline.data.storage import as_place, is_remote, open_folder

OPEN_INDEXES = 64  # two windows of the default size, and as many again
OPEN_FILES = 64


class Member(NamedTuple):
    """One sample as it lies in its shard."""

    key: str
    content: bytes  # the FLAC, WAV, JPEG or PNG file
    length: int  # audio samples at 16 kHz, or pixels
    label: int  # place in the manifest's classes, -1 for none
    description: bytes  # KEY.json

    @property
    def metadata(self) -> dict[str, Any]:
        """What KEY.json says; training has no need of it."""
        return json.loads(self.description)


class ShardedDataset:
    """The samples of one split, numbered in the order of the shards.

    Attributes: ``manifest``; ``kind`` "speech" or "image"; ``fingerprint``, a name of the content and the split;
    ``shard_starts`` int64 ``(shards + 1,)``: the number of each shard's first sample, and ``len()`` at the end.

    ``open_indexes`` of the shards' indexes are kept in memory, None for all; ``cache`` holds the files of a remote data
    set, by default one of the default size. Raises :class:`ManifestError` if the
    folder or the split does not exist; each method that takes a sample raises ``IndexError`` for a number that there is
    not, and :class:`ShardError` if its shard's index can't be read.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        open_indexes: int | None = OPEN_INDEXES,
        cache: ShardCache | None = None,
    ) -> None:
        self.path = as_place(path)
        self.split = split
        self._store = open_folder(self.path)
        self._cache = (cache or ShardCache()) if is_remote(self.path) else None
        self.manifest = read_manifest(self.path)
        if split not in self.manifest.splits:
            splits = ", ".join(sorted(self.manifest.splits))
            raise ManifestError(f"{self.path} has no split {split!r}: use {splits}")
        self._entries = self.manifest.splits[split].shards
        if not self._entries:
            raise ManifestError(f"split {split!r} of {self.path} is empty: give it a larger share when preparing")
        self.kind = self.manifest.kind
        self.fingerprint = self.manifest.fingerprint(split)
        self.shard_starts = np.concatenate([[0], np.cumsum([entry.samples for entry in self._entries], dtype=np.int64)])
        # Threads that miss at the same time read an index twice, which costs less than waiting for each other.
        self._index = lru_cache(maxsize=open_indexes)(self._read_index)
        self._tar = lru_cache(maxsize=OPEN_FILES)(self._open_tar)

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    @property
    def sources(self) -> tuple[ShardedDataset, ...]:
        """Itself, the only one: a data set reads like a mixture of one, by ``sources[reference.source]``."""
        return (self,)

    @property
    def weights(self) -> tuple[float, ...]:
        """As of a mixture of one."""
        return (1.0,)

    def length(self, index: int) -> int:
        """Length of sample ``index``: audio samples at 16 kHz, or pixels."""
        return int(self._record(index)["length"])

    def label(self, index: int) -> int:
        """Place of the sample's label in ``manifest.classes``, -1 for none."""
        return int(self._record(index)["label"])

    def size(self, index: int) -> tuple[int, int]:
        """Width and height of image ``index`` in pixels; (0, 0) for speech."""
        record = self._record(index)
        return int(record["width"]), int(record["height"])

    def keys(self, index: int) -> str:
        """The key of sample ``index``."""
        shard, row = self._place(index)
        return self._index(shard).keys[row]

    def read(self, index: int) -> Member:
        """Bytes and metadata of sample ``index``; raises :class:`ShardError` if the shard is missing or too short."""
        shard, row = self._place(index)
        samples, tar = self._index(shard), self._tar(shard)
        key = samples.keys[row]
        offset, size, json_offset, json_size, length, _, _, label = samples.records[row].item()
        block = os.pread(tar.descriptor, json_offset + json_size - offset, offset)
        if len(block) != json_offset + json_size - offset:
            raise ShardError(f"{self._store.url(self._entries[shard].file)} ends before sample {key}: it was cut short")
        return Member(key, block[:size], length, label, block[json_offset - offset :])

    def shard_lengths(self, shard: int) -> np.ndarray:
        """Lengths of a shard's samples, int64 ``(samples,)``."""
        return self._index(shard).records["length"].astype(np.int64)

    @cached_property
    def length_table(self) -> np.ndarray:
        """Speech: clips of each shard by length, uint32 ``(shards, bins)``, see :mod:`pipeline.data.lengths`."""
        return read_lengths(self.path, self.manifest.splits[self.split])

    def expect(self, shards: Sequence[int]) -> None:
        """These shards will be read soon: what of them is far away begins to come, in this order."""
        if self._cache is not None:
            entries = [self._entries[shard] for shard in shards]
            self._cache.prefetch(self._store, [_index_file(entry) for entry in entries])
            self._cache.prefetch(self._store, [_tar_file(entry) for entry in entries])

    def _record(self, index: int) -> np.void:
        shard, row = self._place(index)
        return self._index(shard).records[row]

    def _place(self, index: int) -> tuple[int, int]:
        """The shard that holds a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is not in split {self.split!r} of {self.path}: it holds {len(self)}")
        shard = int(np.searchsorted(self.shard_starts, index, side="right")) - 1
        return shard, index - int(self.shard_starts[shard])

    def _read_index(self, shard: int) -> ShardIndex:
        entry = self._entries[shard]
        name = self._store.url(entry.index_file)
        with os.fdopen(self._open(_index_file(entry)), "rb") as file:
            index = parse_index(file.read(), name)
        if len(index.keys) != entry.samples:
            raise ShardError(
                f"{name} holds {len(index.keys)} samples, the manifest says {entry.samples}: "
                f"run `tessera verify {self.path}`"
            )
        return index

    def _open_tar(self, shard: int) -> _OpenFile:
        return _OpenFile(self._open(_tar_file(self._entries[shard])))

    def _open(self, file: RemoteFile) -> int:
        """A descriptor of one of the data set's files, or of its copy in the cache."""
        if self._cache is not None:
            return self._cache.open(self._store, file)
        path = self._store.url(file.name)
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise ShardError(f"{path} is missing: run `tessera verify {self.path}`") from None

    def close(self) -> None:
        """Let go of indexes and files; reading opens them again."""
        self._index.cache_clear()
        self._tar.cache_clear()


def _tar_file(entry: ShardEntry) -> RemoteFile:
    return RemoteFile(entry.file, entry.sha256, entry.bytes)


def _index_file(entry: ShardEntry) -> RemoteFile:
    # The manifest does not tell its size: room is kept for keys as long as a tar's plain headers can hold.
    return RemoteFile(entry.index_file, entry.index_sha256, entry.samples * (RECORD.itemsize + 100))


class _OpenFile:
    """A descriptor that closes with its last reader, so that a file may be let go of while a thread still reads it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)
