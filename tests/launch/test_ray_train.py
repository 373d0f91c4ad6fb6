"""Ray Train starts, stops and replaces the ranks; the session's Ray."""

import logging
import os
import re
import signal
import sys
import threading
import time

import pytest
import ray

from launch import ray_places, ray_train
from launch.ray_places import Places
from launch.ray_train import LaunchError, train_on_ray
from launch.stop_file import StopFile
from pipeline.training.run_folder import Run
from pipeline.training.stop import RESUME_ME, STOP_FILE
from recipes.schema import load_recipe
from tests.conftest import IMAGE
from tests.data_prep.processes import session

STEPS = 60
LAUNCH = """
import sys
from launch import cli, ray_places
ray_places.WAIT_LINE_EVERY = 1.0
cli.main()
"""
RANKS = 2


def _train(recipe_file, run, ranks=RANKS, failures=0):
    with StopFile(run) as stop:
        return train_on_ray(recipe_file, run, ranks, stop, failures=failures, use_gpu=False)


@pytest.fixture
def recipe_file(image_dataset, tmp_path):
    overrides = [f"data.path={image_dataset}", *IMAGE, f"training.steps={STEPS}", "training.log_every=1"]
    overrides += ["training.checkpoint_every=5", "training.collective_timeout=60"]
    file = tmp_path / "recipe.yaml"
    file.write_text(load_recipe("image/autoencoder_tiny_ksom", overrides).to_yaml())
    return file


def _states_of_groups():
    return [group["state"] for group in ray.util.placement_group_table().values()]


def _when_attempt(run, attempt, act):
    """In a thread: once that start of the run has logged a step."""

    def wait():
        until = time.monotonic() + 600  # a busy machine starts Ray's workers in minutes
        while time.monotonic() < until:
            log = run.log()
            if log and log[-1]["attempt"] == attempt:
                return act()
            time.sleep(0.02)

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_stops_the_workers_and_a_dead_one_is_replaced(ray_cluster, recipe_file, tmp_path):
    run = Run(tmp_path / "run")
    run.path.mkdir()
    (run.path / STOP_FILE).touch()  # of a launch that died: means nothing to this one
    before = signal.getsignal(signal.SIGUSR1)
    _when_attempt(run, 1, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert _train(recipe_file, run.path) is False
    assert signal.getsignal(signal.SIGUSR1) is before
    stopped_at = run.log()[-1]["step"]
    assert stopped_at < STEPS
    assert [path.name for path in run.list_checkpoints()][-1] == f"step-{stopped_at:08d}"
    assert not (run.path / STOP_FILE).exists()

    _when_attempt(run, 2, lambda: os.kill(run.environment()["ranks"][-1]["pid"], signal.SIGKILL))
    assert _train(recipe_file, run.path, failures=1) is True
    assert {line["attempt"] for line in run.log()} == {1, 2, 3}
    assert run.latest_checkpoint().name == f"step-{STEPS:08d}"


@pytest.mark.timeout(600)
def test_what_a_worker_says_reaches_the_caller(ray_cluster, recipe_file, image_dataset, tmp_path):
    recipe_file.write_text(recipe_file.read_text().replace(str(image_dataset), "/gone"))
    with pytest.raises(LaunchError, match=r"rank \d: .*data set folder /gone does not exist"):
        _train(recipe_file, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_start_without_places_says_so_and_hears_a_signal(ray_cluster, recipe_file, tmp_path):
    cpus = int(ray_cluster["CPU"])

    @ray.remote(num_cpus=cpus)
    class OtherJob:
        def there(self):
            return True

    other = OtherJob.remote()
    try:
        assert ray.get(other.there.remote(), timeout=60)
        command = [sys.executable, "-c", LAUNCH, "launch", str(recipe_file), "--run", str(tmp_path / "run")]
        command += ["--on", "ray", "--ray-address", ray.get_runtime_context().gcs_address, "--ranks-per-node", "2"]
        with session(command, tmp_path / "log") as running:
            until = time.monotonic() + 240
            while "workers with 1 CPU each" not in running.output() or "0 CPU free" not in running.output():
                assert running.process.poll() is None, running.output()
                assert time.monotonic() < until, running.output()
                time.sleep(0.1)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(120) == RESUME_ME, running.output()
        assert "Traceback" not in running.output()
        assert not (tmp_path / "run" / STOP_FILE).exists()
        until = time.monotonic() + 60
        while waiting := set(_states_of_groups()) - {"REMOVED"}:
            assert time.monotonic() < until, f"{waiting} of a run that is over"
            time.sleep(0.1)
    finally:
        ray.kill(other)


def test_more_workers_than_the_nodes_hold_are_refused(ray_cluster, recipe_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ray_train, "JOIN_SECONDS", 0.5)
    cpus = ray_cluster["CPU"]
    words = rf"the nodes of the Ray cluster \({cpus:g} CPU\) hold {cpus:g} of 999 workers with 1 CPU each"
    with pytest.raises(LaunchError, match=f"{words}: use fewer ranks or add nodes"):
        _train(recipe_file, tmp_path / "run", 999)
    assert "waiting for nodes to join, up to 0 s: the nodes" in caplog.text


def test_a_cluster_that_lost_too_many_nodes_is_told_in_time(ray_cluster, monkeypatch, caplog):
    monkeypatch.setattr(ray_places, "WAIT_LINE_EVERY", 1.0)
    monkeypatch.setattr(ray_places, "NODES_SECONDS", 3.0)
    with caplog.at_level(logging.WARNING, "tessera"), Places(999, {"CPU": 1.0}) as places:
        until = time.monotonic() + 60
        while not places.problem:
            assert time.monotonic() < until
            time.sleep(0.1)
    assert not places.taken
    assert re.search(r"of 999 workers with 1 CPU each, since \d+ seconds: use fewer ranks", places.problem)
    assert any(record.message.startswith("waiting for places for 999 workers") for record in caplog.records)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_hangs_at_its_end_does_not_keep_the_caller(
    ray_cluster, recipe_file, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(ray_train, "END_SECONDS", 5.0)
    run = Run(tmp_path / "run")
    frozen = []

    def freeze_at_the_end():
        until = time.monotonic() + 240
        while time.monotonic() < until and not (run.checkpoints / f"step-{STEPS:08d}" / "manifest.json").exists():
            time.sleep(0.005)
        frozen.append(run.environment()["ranks"][-1]["pid"])
        os.kill(frozen[0], signal.SIGSTOP)

    freezer = threading.Thread(target=freeze_at_the_end)
    freezer.start()
    try:
        assert _train(recipe_file, run.path, failures=1) is True
    finally:
        freezer.join()
        os.kill(frozen[0], signal.SIGCONT)
    assert "the run is complete, but Ray has not ended its workers in 5 seconds" in caplog.text
    until = time.monotonic() + 240
    while "CREATED" in _states_of_groups():
        assert time.monotonic() < until, "the cluster is free again, for other tests too"
        time.sleep(0.1)
