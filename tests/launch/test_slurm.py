"""The generated job, submitted: a stand-in for Slurm (tests/launch/slurm/slurm.py) really runs it on two "nodes"."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.training.run_folder import Run
from pipeline.training.stop import RESUME_ME
from tests.conftest import IMAGE

SLURM = Path(__file__).parent / "slurm" / "slurm.py"
STEPS = 40


def _environment(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        shutil.copyfile(SLURM, folder / name)
        (folder / name).chmod(0o755)
    return os.environ | {
        # The environment of `python`, as where it is activated.
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_TEST_STATE": str(tmp_path),
        "SLURM_TEST_LIMIT": str(tmp_path / "limit"),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_at_its_time_limit_saves_and_is_requeued(image_dataset, tmp_path):
    run = Run(tmp_path / "run")
    overrides = [f"data.path={image_dataset}", *IMAGE, f"training.steps={STEPS}", "training.log_every=1"]
    command = [sys.executable, "-m", "launch.cli", "launch", "image/autoencoder_tiny_ksom", *overrides]
    command += ["--on", "slurm", "--run", str(run.path), "--nodes", "2", "--time-limit", "00:30:00"]
    job = subprocess.Popen(command, env=_environment(tmp_path), stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 400
        while not run.log() and job.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        (tmp_path / "limit").touch()
        output, _ = job.communicate(timeout=400)
    finally:
        for process in _below(job.pid):
            process.kill()
        job.kill()
        job.wait()
    told = (run.path / "slurm-4711.log").read_text()
    assert job.returncode == 0, output + told
    assert "Submitted batch job 4711" in output
    assert (tmp_path / "codes").read_text() == f"{RESUME_ME} 0", told
    assert "stopped by SIGUSR1" in told
    log = run.log()
    assert {line["attempt"] for line in log} == {1, 2}
    assert [line["step"] for line in log] == list(range(1, STEPS + 1)), "no step made twice: the stop saved the last"
    assert [rank["rank"] for rank in run.environment()["ranks"]] == [0, 1]


def _below(pid):
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
