"""The generated job on a real Slurm: it trains, goes on after a stop to the same weights, and ends when it should."""

import re
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from launch.files import SECONDS_TO_SAVE
from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from pipeline.training.stop import RESUME_ME
from tests.conftest import IMAGE
from tests.launch.slurm_cluster import slurm_cluster

STEPS = 40

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def submit(slurm, image_dataset):
    """`tessera launch --on slurm`, on both nodes: gives the job's number."""

    def launch(run, *options, fails=False):
        overrides = [f"data.path={image_dataset}", *IMAGE, f"training.steps={STEPS}", "training.log_every=1"]
        command = [sys.executable, "-m", "launch.cli", "launch", "image/autoencoder_tiny_ksom", *overrides]
        told = slurm(*command, "--on", "slurm", "--run", str(run.path), "--nodes", "2", *options, fails=fails)
        return told if fails else told.rpartition("Submitted batch job ")[2].strip()

    return launch


def test_slurm_takes_the_script(slurm, submit, image_dataset, tmp_path):
    overrides = [f"data.path={image_dataset}", *IMAGE]
    command = [sys.executable, "-m", "launch.cli", "launch", "image/autoencoder_tiny_ksom", *overrides, "--on", "slurm"]
    command += ["--run", str(tmp_path / "run"), "--nodes", "2", "--dry-run", "batch.micro_batches=4"]
    script = tmp_path / "job.sbatch"

    def test_only(*options, fails=False):
        script.write_text(slurm(*command, *options))
        return slurm("sbatch", "--test-only", str(script), fails=fails)

    assert "using 2 processors on nodes 127.0.0.[2-3] in partition main" in test_only()
    assert "using 4 processors" in test_only("--ranks-per-node=2", "--no-gpus", "--sbatch", "partition=main")
    assert "Requested node configuration is not available" in test_only("--ranks-per-node=2", fails=True), (
        "one GPU each"
    )
    assert "invalid partition" in submit(Run(tmp_path / "run"), "--sbatch", "partition=long", fails=True)


def test_a_stopped_job_is_requeued_and_ends_with_the_same_weights(slurm, submit, tmp_path):
    """Two jobs side by side: one is stopped by hand, then by Slurm ahead of its time limit."""
    undisturbed, stopped = Run(tmp_path / "undisturbed"), Run(tmp_path / "stopped 50%")
    left_alone = submit(undisturbed)  # with the nodes' GPUs: in name, this machine has none
    job = submit(stopped, "--no-gpus")

    with _held(stopped):
        slurm("scancel", "--signal=USR1", job)
        _wait_for_signal(stopped)
    slurm.wait_for(job, "PENDING", restarts=1)
    log = (stopped.path / f"slurm-{job}.log").read_text()
    assert log.count(f"Exited with exit code {RESUME_ME}") == 2, log
    assert "stopped by SIGUSR1" in log
    slurm.start_again(job)

    with _held(stopped, attempt=2):
        slurm("scontrol", "update", f"JobId={job}", f"TimeLimit={SECONDS_TO_SAVE // 60}")
        _wait_for_signal(stopped)
    slurm.wait_for(job, "PENDING", restarts=2)
    slurm.start_again(job, "TimeLimit=60")

    slurm.wait_for(left_alone, "COMPLETED")
    slurm.wait_for(job, "COMPLETED", restarts=2)
    log = stopped.log()
    assert [line["step"] for line in log] == list(range(1, STEPS + 1)), "each stop saved its last step"
    assert {line["attempt"] for line in log} == {1, 2, 3}
    assert [line["loss"] for line in log] == [line["loss"] for line in undisturbed.log()]
    ranks = stopped.environment()["ranks"]
    assert [rank["rank"] for rank in ranks] == [0, 1]
    expected, actual = read_weights(undisturbed.latest_checkpoint()), read_weights(stopped.latest_checkpoint())
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, submit, tmp_path):
    run = Run(tmp_path / "run")
    job = submit(run)
    with _held(run):
        slurm("scancel", job)
    slurm.wait_for(job, "CANCELLED")
    until = time.monotonic() + 60
    while slurm("squeue", "--noheader", "--jobs", job):
        assert time.monotonic() < until, "still there"
        time.sleep(0.2)
    assert slurm.job(job)["JobState"] == "CANCELLED", "its ranks save, and the job does not requeue itself"
    assert run.latest_checkpoint().name == f"step-{run.log()[-1]['step']:08d}"


def test_a_dead_rank_ends_the_job(slurm, submit, tmp_path):
    run = Run(tmp_path / "run")
    job = submit(run, "--sbatch", "cpus-per-task=2")
    with _held(run):
        dead = psutil.Process(run.environment()["ranks"][1]["pid"])
        assert dead.environ()["OMP_NUM_THREADS"] == "2"
        assert " CPUs=4 Tasks=2 " in slurm("scontrol", "--oneliner", "show", "step", f"{job}.0")
        dead.kill()
    slurm.wait_for(job, "FAILED", seconds=120)
    log = (run.path / f"slurm-{job}.log").read_text()
    assert "task 1: Killed" in log
    assert "error: " in log, "of the other rank"
    assert slurm.job(job)["ExitCode"] == f"{128 + signal.SIGKILL}:0"


@contextmanager
def _held(run, attempt=1):
    """Within the block the ranks stand still, after the first logged step of the start."""
    until = time.monotonic() + 240
    while not (log := run.log()) or log[-1]["attempt"] != attempt:
        assert time.monotonic() < until, "no step in 240 seconds"
        time.sleep(0.02)
    assert log[-1]["step"] < STEPS
    ranks = [psutil.Process(rank["pid"]) for rank in run.environment()["ranks"]]
    for rank in ranks:
        rank.suspend()
    try:
        yield
    finally:
        for rank in ranks:
            if rank.is_running():
                rank.resume()


def _wait_for_signal(run):
    """Until Slurm has signalled each of the run's ranks: a SIGUSR1 waits for it, or Slurm has let it run again."""
    for rank in run.environment()["ranks"]:
        until = time.monotonic() + 120
        while _stands_still(rank["pid"]):
            assert time.monotonic() < until, "Slurm sent no signal in 120 seconds"
            time.sleep(0.1)


def _stands_still(pid):
    try:
        state, mask = re.search(
            r"State:\s*(\w).*ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.S
        ).groups()
    except FileNotFoundError:
        return False
    return state == "T" and not int(mask, 16) >> signal.SIGUSR1 - 1 & 1
