"""A preparation that is killed, and repeated: nothing half-made is taken for whole, and the bytes are the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep import prepare, verify
from tests.data_prep.test_preparation import digests, quiet

SHARD_BYTES = 60_000  # over a hundred shards, so that the kill falls between many
PREPARE = """
import sys
from data_prep import prepare
prepare("speech", sys.argv[1], sys.argv[2], shard_bytes=int(sys.argv[3]), progress=lambda _: None)
"""


@pytest.mark.usefixtures("ray_cluster")
def test_kill_and_repeat_gives_the_same_bytes(speech_source: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", PREPARE, str(speech_source), str(out), str(SHARD_BYTES)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob(".prepare/train/*.json"))) < 5:
            assert process.poll() is None, "the preparation ended before it could be killed"
            assert time.monotonic() < deadline, "the preparation wrote no shard"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its Ray dies with it
        process.wait()
    assert not (out / "manifest.json").exists()
    finished = len(list(out.glob(".prepare/*/*.json")))

    summary = prepare("speech", speech_source, out, shard_bytes=SHARD_BYTES, progress=quiet)
    assert summary.shards > 100
    assert finished <= summary.reused < summary.shards
    untouched = tmp_path / "untouched"
    prepare("speech", speech_source, untouched, shard_bytes=SHARD_BYTES, progress=quiet)
    assert digests(out) == digests(untouched)
    assert verify(out) == []
