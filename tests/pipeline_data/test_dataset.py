"""Random access to prepared samples: the tar's own members, from any number of threads."""

from __future__ import annotations

import contextlib
import io
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from pipeline.data import ManifestError, ShardedDataset
from pipeline.data.index import RECORD, ShardError, ShardIndex, read_index


def test_members_are_those_that_tarfile_finds(speech_dataset: Path) -> None:
    dataset = ShardedDataset(speech_dataset)
    found = {}
    for shard in dataset.manifest.splits["train"].shards:
        with tarfile.open(speech_dataset / shard.file) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                assert stream is not None
                found[member.name] = stream.read()
    assert len(found) == 2 * len(dataset)
    for index in range(len(dataset)):
        member = dataset.read(index)
        assert member.key == dataset.keys(index)
        assert member.content == found[f"{member.key}.flac"]
        assert member.metadata["samples"] == member.length == dataset.length(index)


def test_lengths_and_labels_are_those_of_the_files(speech_dataset: Path, image_dataset: Path) -> None:
    speech = ShardedDataset(speech_dataset, "validation")
    for index in range(len(speech)):
        member = speech.read(index)
        assert soundfile.info(io.BytesIO(member.content)).frames == member.length == speech.length(index)
        assert speech.manifest.classes[member.label] == member.metadata["label"]
        assert speech.label(index) == member.label
    shards = range(len(speech.shard_starts) - 1)
    in_order = np.concatenate([speech.shard_lengths(shard) for shard in shards])
    assert in_order.tolist() == [speech.length(index) for index in range(len(speech))]
    images = ShardedDataset(image_dataset, "validation")
    for index in range(len(images)):
        with Image.open(io.BytesIO(images.read(index).content)) as image:
            assert image.size == images.size(index)
            assert image.width * image.height == images.length(index)


def test_threads_read_at_once(speech_dataset: Path) -> None:
    dataset = ShardedDataset(speech_dataset)
    order = np.random.default_rng(0).integers(0, len(dataset), 2000).tolist()
    expected = [dataset.read(index) for index in range(len(dataset))]
    fresh = ShardedDataset(speech_dataset)
    with ThreadPoolExecutor(8) as pool:
        assert all(member == expected[index] for index, member in zip(order, pool.map(fresh.read, order), strict=True))


def open_files(folder: Path) -> int:
    """How many files below a folder this process holds open."""
    places = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of this listing is gone by now
            places.append(link.readlink())
    return sum(folder in place.parents for place in places)


def test_few_shards_are_held_open(speech_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while more threads than that read: a file closes with its last reader and not before."""
    monkeypatch.setattr("pipeline.data.dataset.OPEN_FILES", 2)
    copy = tmp_path / "copy"
    shutil.copytree(speech_dataset, copy)
    dataset = ShardedDataset(copy, open_indexes=2)
    assert open_files(copy) == 0, "nothing is opened before it is needed"
    expected = [ShardedDataset(speech_dataset).read(index) for index in range(len(dataset))]
    order = np.random.default_rng(0).integers(0, len(dataset), 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(dataset.read, order))
    assert all(member == expected[index] for index, member in zip(order, read, strict=True))
    assert open_files(copy) == 2
    assert dataset._index.cache_info().currsize == 2
    dataset.close()
    assert open_files(copy) == 0


def test_opening_reads_no_index(speech_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(speech_dataset, copy)
    for index in (copy / "train").glob("*.idx"):
        index.unlink()
    dataset = ShardedDataset(copy)
    assert len(dataset) == 191
    with pytest.raises(ShardError, match=r"shard-000000.idx is missing"):
        dataset.keys(0)
    for index_number in (-1, 191):
        with pytest.raises(IndexError, match=rf"sample {index_number} is not in split 'train' of {copy}: it holds 191"):
            dataset.keys(index_number)


def test_an_unknown_split_names_those_there_are(speech_dataset: Path) -> None:
    with pytest.raises(ManifestError, match="no split 'test': use train, validation"):
        ShardedDataset(speech_dataset, "test")


def test_a_missing_or_short_shard_is_named(speech_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(speech_dataset, copy)
    dataset = ShardedDataset(copy, "validation")
    shard = copy / "validation" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"shard-000000.tar ends before sample"):
        dataset.read(len(dataset) - 1)
    dataset.close()
    shard.unlink()
    with pytest.raises(ShardError, match=r"shard-000000.tar is missing"):
        dataset.read(0)


def test_index_round_trip_and_damage(tmp_path: Path) -> None:
    records = np.array([(512, 10, 1536, 20, 16_000, 0, 0, 1), (2560, 5, 3584, 20, 800, 0, 0, -1)], dtype=RECORD)
    content = ShardIndex(records, ["a/été", "b"]).to_bytes()
    path = tmp_path / "shard.idx"
    path.write_bytes(content)
    index = read_index(path)
    assert index.keys == ["a/été", "b"]
    assert (index.records == records).all()
    for damaged, says in [
        (content[:-3], "it is damaged"),
        (content[:60], "it is damaged"),
        (b"not an index", "is not an index"),
        (content.replace(b'"version": 1', b'"version": 2'), "index version 2"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=says):
            read_index(path)
