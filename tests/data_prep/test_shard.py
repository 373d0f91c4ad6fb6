"""One shard, written without Ray: whole or not at all, and by nobody whose preparation is over."""

from __future__ import annotations

import errno
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_prep.shard import ShardRecord, finished_record, finished_records, record_name, write_shard
from data_prep.shard_plan import Settings, ShardTask, plan_shards
from data_prep.source import scan
from pipeline.data.storage import StoreError, open_folder

SETTINGS = Settings("speech", 1_000_000_000, (("train", 1.0),), "file", 0, None)


@pytest.fixture
def task(speech_source: Path) -> ShardTask:
    found = scan("speech", speech_source / "carlo-it", leave_out=Path("/nowhere"))
    (task,) = plan_shards(found.files, SETTINGS)
    return task


def write(out: str | Path, task: ShardTask, workspace: Path) -> ShardRecord:
    return write_shard(out, workspace, task, SETTINGS, {}, "plan")


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """What the kernel then refuses to write is a real failure of the disk, with an errno."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_shard_leaves_tar_index_and_record_and_nothing_else(task: ShardTask, tmp_path: Path) -> None:
    out, workspace = tmp_path / "out", tmp_path / "workspace"
    workspace.mkdir()
    places: list[int] = []
    record = write_shard(out, workspace, task, SETTINGS, {}, "plan", places.append)
    assert files(out) == [".prepare/train/shard-000000.json", "train/shard-000000.idx", "train/shard-000000.tar"]
    assert files(workspace) == []
    assert finished_record(out, task, "plan") == record
    assert finished_record(out, task, "another plan") is None
    assert places == list(range(len(task.files) + 1))


def test_a_disk_that_takes_no_more_leaves_nothing(task: ShardTask, tmp_path: Path) -> None:
    out, workspace = tmp_path / "out", tmp_path / "workspace"
    workspace.mkdir()
    with no_file_larger_than(100_000), pytest.raises(OSError, match=r"File too large") as failure:
        write(out, task, workspace)
    assert failure.value.errno == errno.EFBIG
    assert list(workspace.iterdir()) == []
    assert files(out) == []
    assert write(out, task, workspace).entry is not None


def test_who_has_lost_the_workspace_publishes_nothing(task: ShardTask, tmp_path: Path) -> None:
    """A worker that outlives its driver, while the next preparation clears up: before, between and at the end."""
    out, workspace = tmp_path / "out", tmp_path / "workspace"
    with pytest.raises(FileNotFoundError):
        write(out, task, workspace)
    for lost_at in (0, len(task.files) // 2, len(task.files) - 1):
        workspace.mkdir()

        def clear(place: int, lost_at: int = lost_at) -> None:
            if place == lost_at:
                shutil.rmtree(workspace)

        with pytest.raises(FileNotFoundError):
            write_shard(out, workspace, task, SETTINGS, {}, "plan", clear)
        assert files(out) == []
        assert not workspace.exists()


def test_two_writers_of_one_shard_agree(task: ShardTask, tmp_path: Path) -> None:
    """A worker that was given up for dead and its successor: both publish, the bytes are equal."""
    out, workspace = tmp_path / "out", tmp_path / "workspace"
    workspace.mkdir()
    inner: list[ShardRecord] = []

    def second(place: int) -> None:
        if place == 1:
            inner.append(write(out, task, workspace))
            before.update({name: (out / name).read_bytes() for name in files(out)})

    before: dict[str, bytes] = {}
    outer = write_shard(out, workspace, task, SETTINGS, {}, "plan", second)
    assert [outer] == inner
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    assert (out / record_name(task)).is_file()


def test_a_source_that_is_not_mounted_is_no_fault_of_its_files(speech_source: Path, tmp_path: Path) -> None:
    """A file that is gone is refused; one whose folder is gone too may lie on a disk that this machine does not see."""
    source, workspace = tmp_path / "source", tmp_path / "workspace"
    shutil.copytree(speech_source / "carlo-it", source / "speaker")
    workspace.mkdir()
    (task,) = plan_shards(scan("speech", source, leave_out=Path("/nowhere")).files, SETTINGS)
    Path(task.files[1].path).unlink()
    record = write(tmp_path / "out", task, workspace)
    assert (task.files[1].name, "can't be read: No such file or directory") in [
        (refusal.path, refusal.reason) for refusal in record.refused
    ]
    source.rename(tmp_path / "unmounted")
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "out", task, workspace)


def test_a_shard_goes_to_an_object_store_as_to_a_folder(s3: str, task: ShardTask, tmp_path: Path) -> None:
    out, workspace, url = tmp_path / "out", tmp_path / "workspace", f"{s3}/{tmp_path.name}"
    workspace.mkdir()
    record = write(out, task, workspace)
    assert write(url, task, workspace) == record
    stored = open_folder(url)
    assert {file.name: stored.read(file.name) for file in stored.files()} == {
        name: (out / name).read_bytes() for name in files(out)
    }
    assert finished_records(url, [task], "plan") == finished_records(out, [task], "plan") == {task.stem: record}
    stored.write_whole(f"{task.stem}.tar", b"of another size")
    assert finished_records(url, [task], "plan") == {}
    assert finished_record(url, task, "plan") is None
    assert files(workspace) == []


def test_a_store_that_is_gone_is_named_and_leaves_nothing(
    task: ShardTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("TESSERA_STORE_ATTEMPTS", "2")
    monkeypatch.setenv("TESSERA_STORE_TIMEOUT", "0.3")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    with pytest.raises(StoreError, match=r"s3://gone/set/train/shard-000000.idx did not answer in 2 attempts"):
        write("s3://gone/set", task, workspace)
    assert list(workspace.iterdir()) == []
