"""Reasons to stop, one training a folder, and a lost peer told in words."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed

from pipeline.training import peer_loss
from pipeline.training.run_folder import Run
from pipeline.training.run_lock import LOCK_FILE, RunInUse, RunLock
from pipeline.training.stop import RESUME_ME, STOP_FILE, Interrupted, StopRequest
from tests.distributed.harness import run_ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_a_reason_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.reason == ""
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_stop_file_goes_when_the_run_has_saved(tmp_path):
    file = tmp_path / STOP_FILE
    stop = StopRequest(tmp_path)
    assert stop.reason == ""
    file.touch()
    assert stop.reason == f"the file {file}"
    with pytest.raises(ValueError, match="broken"), stop:
        raise ValueError("broken")
    assert file.exists(), "a run that failed has not done what was asked"
    with pytest.raises(Interrupted), stop:
        raise Interrupted
    assert not file.exists()


def _output_after_torchrun(rank):
    """What the code of a rank prints from the moment on at which a process that stands for torchrun is killed; it must
    have said that it is up. Ends with the rank."""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "test"}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "up\n"
    finally:
        process.kill()
        process.wait()
    return process.stdout.read()


def test_ranks_notice_that_torchrun_is_gone(tmp_path):
    rank = (
        "import time\n"
        "from pipeline.training.stop import StopRequest\n"
        "print('up', flush=True)\n"
        "with StopRequest() as stop:\n"
        "    until = time.monotonic() + 60\n"
        "    while not stop.reason and time.monotonic() < until: time.sleep(0.01)\n"
        f"open({str(tmp_path / 'reason')!r}, 'w').write(stop.reason + '.')\n"
    )
    assert _output_after_torchrun(rank) == "", "the end of the rank's output"
    assert (tmp_path / "reason").read_text() == "the end of torchrun."


def test_a_signal_before_the_first_step_says_resume_me(tmp_path):
    code = (
        "import os, signal, time\n"
        "from pipeline.training.stop import RESUME_ME, leave_when_told\n"
        "leave_when_told(RESUME_ME); os.kill(os.getpid(), signal.SIGUSR1); time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == RESUME_ME


def test_ranks_that_start_leave_with_torchrun():
    """As above, before there is a loop: the main thread waits in C for what will not come."""
    rank = (
        "import time\n"
        "from pipeline.training.stop import RESUME_ME, leave_when_told\n"
        "leave_when_told(RESUME_ME)\n"
        "print('up', flush=True)\n"
        "time.sleep(100)\n"
        "print('late', flush=True)\n"
    )
    assert _output_after_torchrun(rank) == "", "the rank's output ended before it said more"


def test_one_training_a_folder(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(RunInUse, match=rf"is being trained by process {os.getpid()} on .*: wait until it is done"):
        RunLock(tmp_path, patience=0)
    lock.close()
    RunLock(tmp_path, patience=0).close()


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    code = f"import sys, time; from pathlib import Path; from pipeline.training.run_lock import RunLock\n\
lock = RunLock(Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=f"process {process.pid} on"):
            RunLock(tmp_path, patience=0)
    finally:
        process.kill()
        process.wait()
    RunLock(tmp_path, patience=0).close()


def _refused(folder):
    try:
        RunLock(folder, patience=0)
    except RunInUse as error:
        return str(error)
    return ""


def test_every_rank_hears_of_a_folder_in_use(tmp_path):
    with (tmp_path / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answers = run_ranks(_refused, 2, tmp_path)
    assert answers[0] == answers[1]
    assert "is being trained by another process" in answers[0]


def _lose_a_peer(folder):
    """Rank 1 is frozen while rank 0 waits for it; rank 0's words."""
    group = distributed.new_group(timeout=timedelta(seconds=2))
    if distributed.get_rank() == 1:
        time.sleep(6)
        return ""

    class Training:
        collective_timeout = 2

    class Recipe:
        training = Training

    def train(_recipe, _run):
        distributed.all_reduce(torch.ones(1), group=group)

    try:
        peer_loss.explained(train)(Recipe, folder)
    except peer_loss.PeerLost as error:
        return str(error)
    return "no error"


def test_a_frozen_peer_is_an_error_that_says_where_to_look(tmp_path):
    Run(tmp_path).environment_file.write_text(
        '{"ranks": [{"rank": 0, "host": "here", "pid": 1}, {"rank": 1, "host": "node-b", "pid": 4711}]}'
    )
    words = run_ranks(_lose_a_peer, 2, tmp_path)[0]
    assert "rank 0 on " in words
    assert "Timed out" in words
    assert "rank 1: process 4711 on node-b" in words
    assert "training.collective_timeout=2" in words
    assert "GLOO_SOCKET_IFNAME" in words


def test_other_errors_stay_what_they_are(tmp_path):
    def train(_recipe, _run):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match=r"^shape mismatch$"):
        peer_loss.explained(train)(None, tmp_path)


def test_who_was_taken_for_dead_can_not_publish(tmp_path, monkeypatch):
    """Without locks both would hold the folder, and the later start counts; as a writer that sleeps between
    any two of its own steps finds it."""
    from pipeline.training.checkpoint_writer import CheckpointWriter, Retention, _Flight, discard_unfinished

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    facts = {"format_version": 2, "world_size": 1, "zero_stage": 0, "precision": "fp32", "loss": None}
    facts |= {"data_fingerprint": "", "codebook_checksum": "", "parameters": {}, "optimizer_steps": {}}
    checkpoints = tmp_path / "checkpoints"
    before = RunLock(tmp_path)
    before.check()
    writer = CheckpointWriter(checkpoints, Retention(1), lock=before)

    def written(step):
        partial = writer._partial(step)
        partial.mkdir(parents=True)
        (partial / "rank-00000.safetensors").write_bytes(b"weights")
        return _Flight(step, facts | {"step": step}, None)

    writer._complete(written(1), {})
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"]

    flight = written(2)
    monkeypatch.setattr(before, "check", lambda: None)  # has looked just before the other start
    after = RunLock(tmp_path)
    discard_unfinished(checkpoints)
    with pytest.raises(FileNotFoundError):
        writer._complete(flight, {})
    monkeypatch.undo()

    with pytest.raises(RunInUse, match=r"was taken over by process \d+ on .*this one ends here"):
        writer._complete(written(3), {})
    with pytest.raises(RunInUse):
        before.check()
    after.check()
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-00000001"]
