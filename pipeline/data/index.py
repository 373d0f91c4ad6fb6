"""The index of a shard (``shard-000000.idx``): where each sample lies in the tar, and how long or large it is.

In and out: a structured array of :data:`RECORD` and the keys. The file is one line of JSON, the records, and the keys,
one a line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEX_VERSION = 1
RECORD = np.dtype(
    [
        ("offset", "<i8"),  # of the media member's bytes in the tar
        ("size", "<i8"),
        ("json_offset", "<i8"),  # of KEY.json's bytes; always after the media member
        ("json_size", "<i8"),
        ("length", "<i8"),  # audio samples, or width × height
        ("width", "<i4"),
        ("height", "<i4"),
        ("label", "<i4"),  # place in the manifest's classes, -1 for none
    ]
)


class ShardError(ValueError):
    """A shard or its index that can't be read; the message names the file and what is wrong."""


@dataclass(frozen=True)
class ShardIndex:
    """Records and keys of one shard, in the order of the tar."""

    records: np.ndarray  # (samples,) of RECORD
    keys: list[str]

    def to_bytes(self) -> bytes:
        """The file's content; equal indexes give equal bytes."""
        header = {"format": "tessera-index", "version": INDEX_VERSION, "samples": len(self.keys)}
        text = "".join(f"{key}\n" for key in self.keys)
        return json.dumps(header).encode() + b"\n" + self.records.astype(RECORD).tobytes() + text.encode()


_REMEDY = "run `tessera verify` on the data set, then prepare it again"


def read_index(path: Path) -> ShardIndex:
    """Read an index; raises :class:`ShardError` if it is missing, cut short, or of another version."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{path} is missing: {_REMEDY}") from None
    return parse_index(content, str(path))


def parse_index(content: bytes, name: str) -> ShardIndex:
    """The index that a file holds; raises :class:`ShardError` calling it ``name`` if it is cut short, or of another
    version.
    """
    line, _, rest = content.partition(b"\n")
    try:
        header = json.loads(line)
        version, samples = header["version"], header["samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"{name} is not an index: {_REMEDY}") from error
    if version != INDEX_VERSION:
        raise ShardError(f"{name} has index version {version!r}, this Tessera reads {INDEX_VERSION}: {_REMEDY}")
    size = samples * RECORD.itemsize
    keys = rest[size:].decode(errors="replace").splitlines()
    if len(rest) < size or len(keys) != samples:
        raise ShardError(f"{name} says {samples} samples and holds {len(keys)} keys, it is damaged: {_REMEDY}")
    return ShardIndex(np.frombuffer(rest[:size], dtype=RECORD), keys)
