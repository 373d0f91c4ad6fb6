"""How long the clips of a speech data set are, without a number for each: histograms, one a shard.

In: the lengths of a shard's clips, or ``OUT/<split>/lengths.npy``. Out: counts by bin. Bin ``n`` counts the clips of
``n * LENGTH_BIN`` audio samples and more, but less than the next bin's; the last possible one counts every longer clip.
The sampling plan cuts micro-batches by these alone, so it never reads the index of a shard whose turn is far off.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.data.config import LENGTH_BIN, MAX_BINS
from pipeline.data.manifest import ManifestError, SplitEntry
from pipeline.data.storage import Folder, is_remote, open_folder

LENGTHS_NAME = "lengths.npy"


def length_histogram(lengths: np.ndarray) -> np.ndarray:
    """Clips by bin, int64 ``(bins,)`` without trailing zeros, of lengths in audio samples ``(clips,)``."""
    bins = np.minimum(np.asarray(lengths, dtype=np.int64) // LENGTH_BIN, MAX_BINS - 1)
    return np.bincount(bins)


def stack_histograms(histograms: Sequence[Sequence[int]]) -> np.ndarray:
    """One histogram a shard as a table, uint32 ``(shards, bins)``; short ones get zeros."""
    table = np.zeros((len(histograms), max(map(len, histograms))), dtype="<u4")
    for row, histogram in zip(table, histograms, strict=True):
        row[: len(histogram)] = histogram
    return table


def write_lengths(folder: Folder, name: str, table: np.ndarray) -> str:
    """Write such a table whole or not at all; returns the file's SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, table)
    folder.write_whole(name, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_lengths(folder: str | Path, split: SplitEntry) -> np.ndarray:
    """The histograms of a speech split, uint32 ``(shards, bins)``: mapped and not loaded, unless ``folder`` is a URL.

    Raises :class:`ManifestError` if the file is missing or is not the one that the manifest tells of.
    """
    store, name = open_folder(folder), split.lengths_file or LENGTHS_NAME
    path = store.url(name)
    remedy = f"run `tessera verify {folder}`, then prepare it again"
    try:
        table = np.load(io.BytesIO(store.read(name))) if is_remote(folder) else np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise ManifestError(f"{path} is missing: {remedy}") from None
    except (ValueError, EOFError) as error:
        raise ManifestError(f"{path} is not a NumPy array ({error}): {remedy}") from error
    if table.dtype != np.dtype("<u4") or table.shape != (len(split.shards), len(split.lengths)):
        raise ManifestError(
            f"{path} holds {table.dtype} {table.shape}, {len(split.shards)} shards with {len(split.lengths)} bins of "
            f"uint32 belong there: {remedy}"
        )
    return table
