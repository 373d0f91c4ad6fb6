"""Length histograms: what is counted where, and that the file is the one the manifest tells of."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import ManifestError, read_manifest
from pipeline.data.config import LENGTH_BIN, MAX_BINS
from pipeline.data.index import read_index
from pipeline.data.lengths import length_histogram, read_lengths, stack_histograms


def test_a_bin_counts_a_tenth_of_a_second_and_the_last_one_all_beyond() -> None:
    assert length_histogram(np.array([0, 1599, 1600, 3199, 8000])).tolist() == [2, 2, 0, 0, 0, 1]
    assert length_histogram(np.array([], dtype=np.int64)).tolist() == []
    hours = length_histogram(np.array([LENGTH_BIN * MAX_BINS - 1, LENGTH_BIN * MAX_BINS, 16_000 * 7200]))
    assert len(hours) == MAX_BINS
    assert hours[-1] == 3


def test_prepared_histograms_count_what_the_indexes_hold(speech_dataset: Path) -> None:
    for split in read_manifest(speech_dataset).splits.values():
        table = read_lengths(speech_dataset, split)
        assert isinstance(table, np.memmap)
        assert table.sum(axis=1).tolist() == [shard.samples for shard in split.shards]
        expected = [
            length_histogram(read_index(speech_dataset / shard.index_file).records["length"]).tolist()
            for shard in split.shards
        ]
        assert (table == stack_histograms(expected)).all()
        assert table.sum(axis=0).tolist() == split.lengths


def test_a_histogram_file_that_does_not_belong_is_refused(speech_dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(speech_dataset, tmp_path / "copy")
    split = read_manifest(tmp_path / "copy").splits["train"]
    path = tmp_path / "copy" / "train" / "lengths.npy"
    table = np.load(path)
    np.save(path, table[:-1])
    with pytest.raises(ManifestError, match=r"lengths.npy holds uint32 \(8, \d+\), 9 shards"):
        read_lengths(tmp_path / "copy", split)
    path.write_bytes(b"not an array")
    with pytest.raises(ManifestError, match=r"lengths.npy is not a NumPy array.*tessera verify"):
        read_lengths(tmp_path / "copy", split)
    path.unlink()
    with pytest.raises(ManifestError, match=r"lengths.npy is missing"):
        read_lengths(tmp_path / "copy", split)
