"""The cache of remote shards: whole files with the right hash, within its bound, shared by processes."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data import cache
from pipeline.data.cache import RemoteFile, ShardCache
from pipeline.data.index import ShardError
from pipeline.data.storage import Folder, LocalFolder, Patience, StoreError, open_folder

SIZE = 100_000


def content_of(number: int) -> bytes:
    return number.to_bytes(4, "little") * (SIZE // 4)


@pytest.fixture
def files(tmp_path: Path) -> list[RemoteFile]:
    """Eight files in a folder that stands for the store where it doesn't matter which."""
    store = LocalFolder(tmp_path / "store")
    found = []
    for number in range(8):
        store.write_whole(f"{number}.tar", content_of(number))
        found.append(RemoteFile(f"{number}.tar", hashlib.sha256(content_of(number)).hexdigest(), SIZE))
    return found


def read(shards: ShardCache, store: Folder, file: RemoteFile) -> bytes:
    descriptor = shards.open(store, file)
    try:
        return os.pread(descriptor, 2 * SIZE, 0)
    finally:
        os.close(descriptor)


def held(shards: ShardCache) -> set[str]:
    return {path.name for path in shards.folder.iterdir() if not path.suffix and path.name != "room"}


def test_files_come_from_the_store_once(s3: str, tmp_path: Path) -> None:
    store = open_folder(f"{s3}/{tmp_path.name}")
    store.write_whole("one.tar", content_of(1))
    file = RemoteFile("one.tar", hashlib.sha256(content_of(1)).hexdigest(), SIZE)
    shards = ShardCache(tmp_path / "cache")
    assert read(shards, store, file) == content_of(1)
    store.remove("one.tar")
    assert read(shards, store, file) == content_of(1)
    assert {path.name for path in shards.folder.iterdir()} == {file.sha256, "room"}


def test_the_files_used_longest_ago_make_room(tmp_path: Path, files: list[RemoteFile]) -> None:
    store, shards = LocalFolder(tmp_path / "store"), ShardCache(tmp_path / "cache", 3.5 * SIZE / 1e9)
    kept_open = shards.open(store, files[0])
    for file in files[1:3]:
        read(shards, store, file)
    read(shards, store, files[1])
    os.utime(shards.folder / files[2].sha256, ns=(2, 2))
    os.utime(shards.folder / files[0].sha256, ns=(1, 1))
    read(shards, store, files[3])
    assert held(shards) == {files[number].sha256 for number in (1, 2, 3)}
    read(shards, store, files[4])
    assert held(shards) == {files[number].sha256 for number in (1, 3, 4)}
    assert os.pread(kept_open, SIZE, 0) == content_of(0)  # who has it open still reads it
    os.close(kept_open)


def test_what_can_not_be_had_is_named(tmp_path: Path, files: list[RemoteFile]) -> None:
    store, shards = LocalFolder(tmp_path / "store"), ShardCache(tmp_path / "cache", 0.5 * SIZE / 1e9)
    with pytest.raises(ShardError, match=r"0.tar has 0.0001 GB, data.cache_gigabytes=5e-05 holds less: use 0.0002"):
        shards.open(store, files[0])
    shards = ShardCache(tmp_path / "cache")
    store.remove("0.tar")
    with pytest.raises(ShardError, match=r"store/0.tar is missing: run `tessera verify"):
        shards.open(store, files[0])
    store.write_whole("1.tar", content_of(2))
    with pytest.raises(ShardError, match=r"store/1.tar: its SHA-256 is .*, the manifest says"):
        shards.open(store, files[1])
    assert held(shards) == set()
    assert not list(shards.folder.glob("*.part"))
    with pytest.raises(ValueError, match=r"data.cache_gigabytes=0: use a number above 0"):
        ShardCache(tmp_path, 0)


class SpoiledOnce(LocalFolder):
    """A store whose first transfer flips a bit."""

    spoil = True

    def fetch(self, name: str, target: Path) -> None:
        super().fetch(name, target)
        if self.spoil:
            target.write_bytes(b"x" + target.read_bytes()[1:])
        self.spoil = False


def test_a_spoiled_transfer_is_repeated(tmp_path: Path, files: list[RemoteFile]) -> None:
    assert read(ShardCache(tmp_path / "cache"), SpoiledOnce(tmp_path / "store"), files[1]) == content_of(1)


class Slow(LocalFolder):
    """A store that sends only when it may."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.may, self.fetched = threading.Event(), []  # type: ignore[var-annotated]

    def fetch(self, name: str, target: Path) -> None:
        self.fetched.append(name)
        assert self.may.wait(60)
        super().fetch(name, target)


def test_threads_that_want_the_same_file_fetch_it_once(tmp_path: Path, files: list[RemoteFile]) -> None:
    store, shards = Slow(tmp_path / "store"), ShardCache(tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(read, shards, store, files[0]) for _ in range(4)]
        while not store.fetched:
            time.sleep(0.001)
        store.may.set()
        assert {future.result() for future in waiting} == {content_of(0)}
    assert store.fetched == ["0.tar"]


def test_waiting_is_told(
    tmp_path: Path, files: list[RemoteFile], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "SAY_EVERY", 0.02)
    store, shards = Slow(tmp_path / "store"), ShardCache(tmp_path / "cache")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(read, shards, store, files[0])
        while not caplog.records:
            time.sleep(0.001)
        store.may.set()
        assert waiting.result() == content_of(0)
    assert "s for " + store.url("0.tar") + ": 0.0 of 0.1 MB are here" in caplog.records[0].message
    assert caplog.records[0].levelno == logging.WARNING


def test_prefetching_takes_half_the_room_and_gives_way(tmp_path: Path, files: list[RemoteFile]) -> None:
    store, shards = Slow(tmp_path / "store"), ShardCache(tmp_path / "cache", 14 * SIZE / 1e9)
    shards.prefetch(store, files)  # seven fit into half of the room; four are fetched at a time
    while len(store.fetched) < 4:
        time.sleep(0.001)
    with ThreadPoolExecutor(1) as pool:
        urgent = pool.submit(read, shards, store, files[6])
        while len(store.fetched) < 5:
            time.sleep(0.001)
        assert sorted(store.fetched) == ["0.tar", "1.tar", "2.tar", "3.tar", "6.tar"]
        store.may.set()
        assert urgent.result() == content_of(6)
    while len(held(shards)) < 7:
        time.sleep(0.001)
    shards.close()
    assert sorted(store.fetched) == [f"{number}.tar" for number in range(7)]


def test_a_store_that_is_down_while_prefetching_is_asked_again(tmp_path: Path, files: list[RemoteFile]) -> None:
    dead = open_folder("http://127.0.0.1:9", Patience(attempts=1, timeout=0.2))
    shards = ShardCache(tmp_path / "cache")
    shards.prefetch(dead, files[:1])
    while shards._downloads:
        time.sleep(0.001)
    with pytest.raises(StoreError, match=r"http://127.0.0.1:9/0.tar did not answer in 1 attempts"):
        shards.open(dead, files[0])
    assert read(shards, LocalFolder(tmp_path / "store"), files[0]) == content_of(0)


def read_at_random(
    folder: Path, store: str, files: list[RemoteFile], seed: int, results: multiprocessing.Queue
) -> None:
    """A rank: reads files in an order of its own and says whether each was right and the cache within its bound."""
    import random

    shards, order = ShardCache(folder, 3.5 * SIZE / 1e9), random.Random(seed)
    right, largest = 0, 0
    for _ in range(60):
        number = order.randrange(len(files))
        right += read(shards, LocalFolder(store), files[number]) == content_of(number)
        with shards._room():
            largest = max(largest, sum(path.stat().st_size for path in folder.iterdir() if not path.suffix))
    results.put((right, largest))


def test_processes_share_a_cache_that_holds_less_than_they_read(tmp_path: Path, files: list[RemoteFile]) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (tmp_path / "cache", str(tmp_path / "store"), files)
    ranks = [context.Process(target=read_at_random, args=(*arguments, seed, results)) for seed in range(4)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert [right for right, _ in found] == [60] * 4
    assert max(largest for _, largest in found) <= 3.5 * SIZE


def die_while_downloading(folder: Path, store: str, file: RemoteFile) -> None:
    class Deadly(LocalFolder):
        def fetch(self, name: str, target: Path) -> None:
            target.write_bytes(b"half")
            os.kill(os.getpid(), 9)

    ShardCache(folder).open(Deadly(store), file)


def test_what_a_killed_rank_left_is_cleared(tmp_path: Path, files: list[RemoteFile]) -> None:
    context = multiprocessing.get_context("fork")
    rank = context.Process(target=die_while_downloading, args=(tmp_path / "cache", str(tmp_path / "store"), files[0]))
    rank.start()
    rank.join()
    shards = ShardCache(tmp_path / "cache", 1.5 * SIZE / 1e9)  # no room for another beside what was left
    assert len(list(shards.folder.glob("*.part"))) == len(list(shards.folder.glob("*.lock"))) == 1
    assert read(shards, LocalFolder(tmp_path / "store"), files[1]) == content_of(1)
    assert not list(shards.folder.glob("*.*"))
    assert read(shards, LocalFolder(tmp_path / "store"), files[0]) == content_of(0)
