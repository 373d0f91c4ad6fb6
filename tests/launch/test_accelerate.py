"""`accelerate launch -m pipeline.training …` starts the same trainer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.training.run_folder import Run
from tests.conftest import IMAGE

STEPS = 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_accelerate_starts_the_ranks(image_dataset, tmp_path):
    run = Run(tmp_path / "run")
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--num_processes", "2"]
    # --multi_gpu is its word for torchrun, here too where there is none; with --cpu it would start one process.
    command += ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["-m", "pipeline.training", "image/autoencoder_tiny_ksom", f"data.path={image_dataset}", *IMAGE]
    command += [f"training.steps={STEPS}", "training.log_every=1", "--run-dir", str(run.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "huggingface")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert [rank["rank"] for rank in run.environment()["ranks"]] == [0, 1]
    assert run.latest_checkpoint().name == f"step-{STEPS:08d}"
