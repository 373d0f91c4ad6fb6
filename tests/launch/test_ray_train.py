"""Ray Train starts, stops and replaces the ranks; the session's Ray."""

import os
import signal
import threading
import time

import pytest

from launch.ray_train import LaunchError, train_on_ray
from pipeline.training.run_folder import Run
from pipeline.training.stop import STOP_FILE
from recipes.schema import load_recipe
from tests.conftest import IMAGE

STEPS = 60
RANKS = 2


@pytest.fixture
def recipe_file(image_dataset, tmp_path):
    overrides = [f"data.path={image_dataset}", *IMAGE, f"training.steps={STEPS}", "training.log_every=1"]
    overrides += ["training.checkpoint_every=5", "training.collective_timeout=60"]
    file = tmp_path / "recipe.yaml"
    file.write_text(load_recipe("image/autoencoder_tiny_ksom", overrides).to_yaml())
    return file


def _when_attempt(run, attempt, act):
    """In a thread: once that start of the run has logged a step."""

    def wait():
        until = time.monotonic() + 240
        while time.monotonic() < until:
            log = run.log()
            if log and log[-1]["attempt"] == attempt:
                return act()
            time.sleep(0.02)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.timeout(900)
def test_a_signal_stops_the_workers_and_a_dead_one_is_replaced(ray_cluster, recipe_file, tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / STOP_FILE).touch()  # of a launch that died: means nothing to this one
    before = signal.getsignal(signal.SIGUSR1)
    _when_attempt(run, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert train_on_ray(recipe_file, run.path, RANKS, failures=0, use_gpu=False) is False
    assert signal.getsignal(signal.SIGUSR1) is before
    stopped_at = run.log()[-1]["step"]
    assert stopped_at < STEPS
    assert [path.name for path in run.list_checkpoints()][-1] == f"step-{stopped_at:08d}"
    assert not (run.path / STOP_FILE).exists()

    _when_attempt(run, 2, lambda: os.kill(run.environment()["ranks"][-1]["pid"], signal.SIGKILL))
    assert train_on_ray(recipe_file, run.path, RANKS, failures=1, use_gpu=False) is True
    assert {line["attempt"] for line in run.log()} == {1, 2, 3}
    assert run.latest_checkpoint().name == f"step-{STEPS:08d}"


@pytest.mark.timeout(600)
def test_what_a_worker_says_reaches_the_caller(ray_cluster, recipe_file, image_dataset, tmp_path):
    recipe_file.write_text(recipe_file.read_text().replace(str(image_dataset), "/gone"))
    with pytest.raises(LaunchError, match=r"rank \d: .*data set folder /gone does not exist"):
        train_on_ray(recipe_file, tmp_path / "run", RANKS, use_gpu=False)
