"""A data set behind a URL: the same micro-batches as from a folder, through a cache of bounded size; and an error when
the store is gone.
"""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path

import pytest
import torch

from pipeline.data import (
    BatchConfig,
    DataConfig,
    ImageBatch,
    ImageCollation,
    SamplingPlan,
    ShardedDataset,
    build_loader,
    open_data,
)
from pipeline.data.cache import ShardCache
from pipeline.data.index import ShardError
from pipeline.data.storage import StoreError, open_folder
from tests.conftest import start_s3_server

BATCH = BatchConfig(micro_batches=2, samples=10)


def upload(folder: Path, url: str) -> None:
    store = open_folder(url)
    for path in folder.rglob("*"):
        if path.is_file() and ".prepare" not in path.parts:
            store.write_whole(path.relative_to(folder).as_posix(), path.read_bytes())


def batches(data: DataConfig, steps: int) -> list[ImageBatch]:
    dataset = open_data(data)
    plan = SamplingPlan(dataset, BATCH, data, seed=1)
    with build_loader(dataset, plan, ImageCollation(data, seed=1), steps=steps) as loader:
        found = [batch for step in loader for batch in step]
    dataset.close()
    return found


def test_a_remote_mixture_gives_the_same_batches_from_a_small_cache(
    s3: str, image_dataset: Path, tmp_path: Path
) -> None:
    url = f"{s3}/{tmp_path.name}"
    upload(image_dataset, url)
    size = max(path.stat().st_size for path in image_dataset.rglob("*.tar"))
    room = 3.5 * size / 1e9

    def mixed(path: str | Path) -> DataConfig:
        mix = [{"path": path}, {"path": path, "split": "validation", "weight": 0.3}]
        values = {"mix": mix, "window_shards": 1, "cache": tmp_path / "cache", "cache_gigabytes": room}
        return DataConfig.model_validate(values)

    local, remote = batches(mixed(image_dataset), 15), batches(mixed(url), 15)
    for one, other in zip(local, remote, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.pixels, other.pixels)
    held = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert 0 < sum(held) <= room * 1e9


def test_a_remote_speech_plan_is_the_folders(s3: str, speech_dataset: Path, tmp_path: Path) -> None:
    upload(speech_dataset, f"{s3}/{tmp_path.name}")
    cache = ShardCache(tmp_path / "cache")
    here, there = ShardedDataset(speech_dataset), ShardedDataset(f"{s3}/{tmp_path.name}", cache=cache)
    assert (there.length_table == here.length_table).all()
    batch, data = BatchConfig(micro_batches=4, seconds=30), DataConfig(window_shards=2)
    one, other = (SamplingPlan(dataset, batch, data, seed=1) for dataset in (here, there))
    assert one.fingerprint == other.fingerprint, "a data set may move"
    assert [one.micro_batch(9, b) for b in range(4)] == [other.micro_batch(9, b) for b in range(4)]
    assert here.read(50) == there.read(50)


def test_remote_shards_that_are_missing_or_changed_are_named(s3: str, image_dataset: Path, tmp_path: Path) -> None:
    copy, url = tmp_path / "copy", f"{s3}/{tmp_path.name}"
    shutil.copytree(image_dataset, copy)
    shard = copy / "train" / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    (copy / "train" / "shard-000001.tar").unlink()
    upload(copy, url)
    dataset = ShardedDataset(url, cache=ShardCache(tmp_path / "cache"))
    with pytest.raises(ShardError, match=r"shard-000000.tar: its SHA-256 is .*tessera verify s3://"):
        dataset.read(0)
    with pytest.raises(ShardError, match=r"shard-000001.tar is missing"):
        dataset.read(int(dataset.shard_starts[1]))


def test_a_store_that_dies_in_the_middle_ends_the_run_with_its_name(
    image_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import boto3

    process, endpoint = start_s3_server()
    try:
        for name, value in (("ENDPOINT_URL", endpoint), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("TESSERA_STORE_ATTEMPTS", "2")
        monkeypatch.setenv("TESSERA_STORE_TIMEOUT", "0.6")
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="dying")
        url = "s3://dying/images"
        upload(image_dataset, url)
        size = max(path.stat().st_size for path in image_dataset.rglob("*.tar"))
        data = DataConfig(path=url, window_shards=1, cache=tmp_path / "cache", cache_gigabytes=1.5 * size / 1e9)
        dataset = open_data(data)
        plan = SamplingPlan(dataset, BATCH, data, seed=1)
        with (
            build_loader(dataset, plan, ImageCollation(data, seed=1), steps=1000) as loader,
            caplog.at_level(logging.WARNING),
        ):
            next(loader)
            process.send_signal(signal.SIGSTOP)  # takes connections and says nothing more
            with pytest.raises(StoreError, match=r"s3://dying/images/train/shard-.* did not answer in 2 attempts"):
                for _ in loader:
                    pass
        assert "attempt 1 of 2" in caplog.text
    finally:
        process.kill()
        process.wait()
