"""Preparations that are killed, stopped and run into walls, and repeated: what was finished stays, and the bytes are
those of an undisturbed one.

The fast tests join the Ray of the test session; the slow ones start their own, which is killed too.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import ray

from data_prep import PreparationError, prepare, verify
from data_prep.lock import sole_workspace
from tests.data_prep.conftest import POISON
from tests.data_prep.processes import GCS, RAY_WORKER, RAYLET, Session, descendants, session
from tests.data_prep.test_preparation import digests, quiet

SHARD_BYTES = 60_000  # of the sample: over a hundred shards, so that a kill falls between many
TESSERA = [sys.executable, "-c", "from launch.cli import main; main()"]


def command(source: Path, out: Path, *options: str, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """The command line of a preparation."""
    places = ["prepare", "speech", str(source), str(out)]
    return [*TESSERA, *places, "--split", "train=0.9,validation=0.1", "--shard-bytes", str(shard_bytes), *options]


@pytest.fixture
def address(ray_cluster: dict[str, float]) -> str:
    """Where the test session's Ray is."""
    return ray.get_runtime_context().gcs_address


def wait_until(reached: Callable[[], bool], running: Session) -> None:
    """Look often; fails with the preparation's output if it ends before."""
    deadline = time.monotonic() + 120
    while not reached():
        assert running.process.poll() is None, running.output()
        assert time.monotonic() < deadline, running.output()
        time.sleep(0.002)


def records(out: Path) -> list[Path]:
    """One for each finished shard."""
    return list(out.glob(".prepare/*/*.json"))


def finished_files(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of each file of a finished shard: they change when it is written anew."""
    found = {}
    for record in records(out):
        entry = json.loads(record.read_bytes())["entry"]
        files = [record, *(out / entry["file"]).parent.glob(f"{Path(entry['file']).stem}.*")] if entry else [record]
        for path in files:
            status = path.stat()
            found[path.relative_to(out).as_posix()] = (status.st_ino, status.st_mtime_ns)
    return found


def assert_kept(out: Path, before: dict[str, tuple[int, int]]) -> None:
    now = finished_files(out)
    assert {name: now.get(name) for name in before} == before


def leftovers(out: Path) -> list[str]:
    """What only a preparation at work may have."""
    return [path.name for pattern in (".prepare/*-*", "*.tmp-*", "*/*.tmp-*") for path in out.glob(pattern)]


def test_a_killed_worker_and_a_killed_driver_change_nothing(address: str, speech_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    with session(command(speech_source, out, "--ray-address", address), tmp_path / "log") as running:
        wait_until(lambda: len(records(out)) >= 3, running)
        wait_until(lambda: kill_one(descendants(os.getpid(), RAY_WORKER)), running)
        seen = len(records(out))
        wait_until(lambda: len(records(out)) >= seen + 5, running)
        running.kill()
        running.process.wait()
    assert not (out / "manifest.json").exists()
    before = finished_files(out)

    summary = prepare("speech", speech_source, out, shard_bytes=SHARD_BYTES, progress=quiet)
    assert summary.shards > 100
    assert 8 <= summary.reused < summary.shards
    assert_kept(out, before)
    untouched = tmp_path / "untouched"
    prepare("speech", speech_source, untouched, shard_bytes=SHARD_BYTES, progress=quiet)
    assert digests(out) == digests(untouched)
    assert verify(out) == []


def kill_one(pids: list[int]) -> bool:
    """SIGKILL the first; False if there is none."""
    with suppress(ProcessLookupError):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_whose_worker_always_dies_ends_the_preparation(speech_source: Path, tmp_path: Path) -> None:
    over = threading.Event()

    def kill_all() -> None:
        while not over.is_set():
            kill_one(descendants(os.getpid(), RAY_WORKER))
            time.sleep(0.02)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        with pytest.raises(PreparationError) as failure:
            prepare("speech", speech_source, tmp_path / "out", splits="train", workers=1, progress=quiet)
    finally:
        over.set()
        killer.join()
    said = re.search(
        r"shard train/shard-000000 can't be written, (\d+) attempts failed, the last at", str(failure.value)
    )
    assert said is not None, failure.value
    assert 4 <= int(said[1]) <= 16
    assert "repeat the command" in str(failure.value)
    assert leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_stop_in_order(
    address: str, speech_source: Path, tmp_path: Path, number: signal.Signals
) -> None:
    out = tmp_path / "stopped"
    with session(command(speech_source, out, "--ray-address", address), tmp_path / "log") as running:
        wait_until(lambda: len(records(out)) >= 3, running)
        running.process.send_signal(number)
        assert running.process.wait(60) == 130
        said = running.output().splitlines()[-1]
    assert said.startswith("stopped with ")
    assert said.endswith(f" shards of {out} finished: the same command goes on from there")
    assert len(records(out)) >= int(said.split()[2]) >= 1
    assert leftovers(out) == []
    assert not (out / "manifest.json").exists()
    assert "Traceback" not in running.output()


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_preparation_of_the_same_folder_is_refused(speech_source: Path, tmp_path: Path) -> None:
    with (
        sole_workspace(tmp_path / "out" / ".prepare"),
        pytest.raises(PreparationError, match=f"out is being prepared by process {os.getpid()} on "),
    ):
        prepare("speech", speech_source, tmp_path / "out", progress=quiet)
    assert prepare("speech", speech_source, tmp_path / "out", progress=quiet).samples == 208


def test_an_address_where_no_ray_is_is_told_at_once(speech_source: Path, tmp_path: Path) -> None:
    with socket.socket() as silent:  # bound, and not listening
        silent.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with session(command(speech_source, tmp_path / "out", "--ray-address", address), tmp_path / "log") as running:
            assert running.process.wait(60) == 2
    assert running.output().splitlines()[-1].startswith(f"error: no Ray cluster answers at {address}: ")
    assert leftovers(tmp_path / "out") == []


@pytest.mark.slow
def test_a_file_that_kills_its_decoder_is_set_aside(
    speech_source: Path, crashing_decoder: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(speech_source, source)
    good = [path for path in sorted(source.rglob("*.flac")) if "broken" not in path.name]
    poisoned = [good[3], good[70], good[71], good[140]]
    for path in poisoned:
        path.write_bytes(path.read_bytes() + POISON)
    prepare_there = ["env", f"PYTHONPATH={crashing_decoder}", *command(source, out, shard_bytes=3_000_000)]
    with session(prepare_there, tmp_path / "log") as running:
        assert running.process.wait(200) == 0, running.output()
    refused = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    killers = {each["path"] for each in refused if each["reason"] == "kills the process that decodes it (SIGSEGV)"}
    assert killers == {path.relative_to(source).as_posix() for path in poisoned}
    assert len(refused) == 4 + 3


@pytest.mark.slow
def test_a_full_disk_is_told_and_leaves_nothing_half_written(speech_source: Path, tmp_path: Path) -> None:
    """A file system of 4 MB for 11 MB of shards, in a mount namespace that ends with the test."""
    unshare = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody make a mount namespace (unshare --mount)")
    small, out = tmp_path / "small", tmp_path / "small" / "out"
    small.mkdir()
    script = """
        mount -t tmpfs -o size=4m tmpfs "$1" && shift || exit 99
        "$@"; echo "exit code $?"
        find . -name '*-*' -not -name 'shard-*'
        find . -name '*.json' | wc -l
        mount -o remount,size=64m . && "$@" && echo "went on"
    """
    prepare_there = command(speech_source, out, shard_bytes=500_000)
    script = "cd /; " + script.replace("find .", f"find {small}").replace(",size=64m .", f",size=64m {small}")
    with session([*unshare, "sh", "-c", script, "sh", str(small), *prepare_there], tmp_path / "log") as running:
        running.process.wait(200)
    lines = running.output().splitlines()
    if "exit code 99" in lines:
        pytest.skip(f"this machine mounts no tmpfs: {lines}")
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error.startswith(f"error: {out} can't take more data (No space left on device): about ")
    assert "MB are still to be written there and " in error
    at = lines.index("exit code 2")
    assert 1 < int(lines[at + 1]) < 20, lines  # no workspace, no temporary file, and some shards finished
    assert lines[-1] == "went on"
    assert "shards were finished before" in running.output()


def copies(source: Path, folder: Path, number: int) -> Path:
    """A tree with every file of ``source`` several times, as links."""
    for copy in range(number):
        for path in source.rglob("*"):
            if path.is_file():
                link = folder / f"copy-{copy:02d}" / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    return folder


def campaign(
    source: Path, folder: Path, kills: int, seed: int, expected: dict[str, str], shard_bytes: int
) -> Counter[str]:
    """Prepare ``source`` again and again, killing processes at random, until ``kills`` have been; returns how often
    each kind was. Every data set that is finished must be the ``expected`` one.
    """
    draw = random.Random(seed)
    done: Counter[str] = Counter()
    victims = {"driver": "", "worker": RAY_WORKER, "raylet": RAYLET, "gcs": GCS}
    round_number = starts = 0
    while done.total() < kills:
        out = folder / f"round-{round_number}"
        starts += 1
        with session(command(source, out, shard_bytes=shard_bytes), folder / f"log-{starts}") as running:
            before = finished_files(out)
            while running.process.poll() is None:
                (kind,) = draw.choices(list(victims), weights=[4, 6, 2, 1])
                if draw.random() < 0.2:  # at any time, as likely while Ray starts
                    wanted, moment = 0, draw.uniform(0, 6)
                else:  # among shards
                    wanted, moment = len(records(out)) + draw.randint(1, 12), draw.uniform(0, 0.2)
                while running.process.poll() is None and len(records(out)) < wanted:
                    time.sleep(0.002)
                with suppress(subprocess.TimeoutExpired):
                    running.process.wait(moment)
                if done.total() < kills and running.kill(victims[kind]):
                    done[kind] += 1
                    if kind != "worker":
                        running.process.wait(120)  # however Ray died, the preparation ends
            assert_kept(out, before)
        if running.process.returncode == 0:
            assert digests(out) == expected, f"round {round_number} of seed {seed}"
            shutil.rmtree(out)
            round_number += 1
        else:
            assert running.process.returncode in (-signal.SIGKILL, 2), running.output()
    return done


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_thirty_random_kills_change_nothing(speech_source: Path, tmp_path: Path) -> None:
    source = copies(speech_source, tmp_path / "source", 12)
    with session(command(source, tmp_path / "untouched", shard_bytes=800_000), tmp_path / "log") as running:
        assert running.process.wait(200) == 0, running.output()
    expected = digests(tmp_path / "untouched")
    assert verify(tmp_path / "untouched") == []
    done = campaign(source, tmp_path, kills=30, seed=4, expected=expected, shard_bytes=800_000)
    assert done.total() == 30
    assert set(done) == {"driver", "worker", "raylet", "gcs"}, done
