"""The promise, on real processes: weights and codebooks depend neither on the number of ranks nor on a kill.

Five short runs of the image recipe under real DeepSpeed and gloo, shared by the tests: undisturbed on 2 ranks, killed
and resumed on 2 ranks, on 1 rank, on 3 ranks, and stopped on 2 ranks to go on on 3 under another ZeRO stage. What is
killed or stopped runs under torchrun and the command.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.local import local_command
from launch.start import check_run
from pipeline.training.checkpoint import CheckpointError, find_damage, find_latest, list_checkpoints, read_weights
from pipeline.training.run_folder import Run
from pipeline.training.stop import RESUME_ME
from recipes.schema import RecipeError, load_recipe
from tests.conftest import SMALL_IMAGE
from tests.distributed.harness import run_ranks

RECIPE = "image/autoencoder_tiny_ksom"
STEPS = 12
OVERRIDES = [
    *SMALL_IMAGE,
    "batch.micro_batches=6",
    f"training.steps={STEPS}",
    "training.checkpoint_every=4",
    "codebooks.check_every=2",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _start(dataset, run, ranks, *more):
    command = local_command(RECIPE, [f"data.path={dataset}", *OVERRIDES, *more], run, ranks)
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(process):
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, output


def _train(dataset, run, ranks, *more):
    """The whole trainer, on ranks that start in a fraction of what torchrun's take."""
    run_ranks(_train_as_a_rank, ranks, run, [f"data.path={dataset}", *OVERRIDES, *more], timeout=240)
    return Run(run)


def _train_as_a_rank(run, overrides):
    from pipeline.training import train

    train(load_recipe(RECIPE, overrides), run)


def _kill_a_rank(run, process, after_step):
    """SIGKILL to the last rank once the run has a checkpoint and has logged past ``after_step``."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        log = run.log()
        if log and log[-1]["step"] >= after_step and run.list_checkpoints():
            os.kill(run.environment()["ranks"][-1]["pid"], signal.SIGKILL)
            return log[-1]["step"]
        time.sleep(0.01)
    raise AssertionError("the run ended before it could be killed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("promise")


@pytest.fixture(scope="module")
def undisturbed(image_dataset, folder):
    return _train(image_dataset, folder / "undisturbed", 2)


@pytest.fixture(scope="module")
def killed_and_resumed(image_dataset, folder):
    run = Run(folder / "killed")
    process = _start(image_dataset, run.path, 2)
    killed_at = _kill_a_rank(run, process, after_step=5)
    code, output = _finish(process)
    assert code != 0, "torchrun must report the killed rank"
    assert killed_at < STEPS, output
    return _train(image_dataset, run.path, 2)


def _start_command(dataset, run, ranks, *more):
    command = [str(Path(sys.executable).with_name("tessera")), "train", RECIPE]
    command += [f"data.path={dataset}", *OVERRIDES, *more, "--run", str(run), "--ranks", str(ranks)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def stopped_and_resumed(image_dataset, folder):
    """Stopped by a signal to the command, and gone on with on another number of ranks and ZeRO stage."""
    run = Run(folder / "stopped")
    process = _start_command(image_dataset, run.path, 2)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and not run.log():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    code, output = _finish(process)
    assert code == RESUME_ME, output
    assert "the same command goes on" in output
    saved = [int(path.name.removeprefix("step-")) for path in run.list_checkpoints()]
    assert saved, output
    assert saved[-1] == run.log()[-1]["step"] < STEPS, "the state of the last step is what was saved"
    process = _start_command(image_dataset, run.path, 3, "engine.zero_stage=3")
    code, output = _finish(process)
    assert code == 0, output
    return run


def _weights(run):
    return read_weights(run.latest_checkpoint())


def test_a_killed_and_resumed_run_is_bit_identical(undisturbed, killed_and_resumed):
    expected, actual = _weights(undisturbed), _weights(killed_and_resumed)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


def test_the_log_has_the_share_of_time_that_was_spent_waiting_for_data(undisturbed):
    shares = [line["data_wait_share"] for line in undisturbed.log()]
    assert 0 < shares[0] <= 1  # nothing was decoded ahead of the first step
    assert all(0 <= share <= 1 for share in shares)


def test_the_resumed_run_repeats_the_killed_runs_losses(undisturbed, killed_and_resumed):
    expected = {line["step"]: line["loss"] for line in undisturbed.log()}
    assert sorted(expected) == list(range(1, STEPS + 1))
    log = killed_and_resumed.log()
    assert {line["attempt"] for line in log} == {1, 2}
    for line in log:
        assert line["loss"] == expected[line["step"]], line["step"]


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_number_of_ranks_trains_the_same_weights(image_dataset, folder, undisturbed, ranks):
    """Only the order of fp32 sums differs. One step's rounding (1e-7) grows through Adam's normalisation over the run's
    12 steps; a wrong normalisation or sample order would be off by more than the learning rate (1e-3) within a step."""
    other = _train(image_dataset, folder / f"ranks-{ranks}", ranks, "engine.zero_stage=1")
    _assert_close(undisturbed, other)


def test_a_stopped_run_goes_on_in_another_layout(undisturbed, stopped_and_resumed):
    _assert_close(undisturbed, stopped_and_resumed)
    assert {line["attempt"] for line in stopped_and_resumed.log()} == {1, 2}
    assert sorted({line["step"] for line in stopped_and_resumed.log()}) == list(range(1, STEPS + 1))


def _assert_close(undisturbed, other):
    expected, actual = _weights(undisturbed), _weights(other)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                actual[name], tensor, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}"
            )
    losses = [line["loss"] for line in undisturbed.log()], [line["loss"] for line in other.log()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_training_learns(undisturbed):
    log = undisturbed.log()
    assert log[-1]["loss"] < log[0]["loss"]


def test_a_damaged_checkpoint_is_named_and_passed_over(undisturbed, tmp_path):
    import shutil

    folder = tmp_path / "checkpoints"
    shutil.copytree(undisturbed.checkpoints, folder)
    newest, previous = list_checkpoints(folder)[::-1][:2]
    file = max(
        (path for path in newest.iterdir() if path.suffix == ".safetensors"), key=lambda path: path.stat().st_size
    )
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found, passed_over = find_latest(folder)
    assert found == previous
    assert len(passed_over) == 1
    assert f"{file} has another sha256" in passed_over[0]
    file.write_bytes(content[:-10])
    assert f"{len(content) - 10} bytes, {len(content)} were written" in find_damage(newest)
    file.unlink()
    assert find_damage(newest) == f"{file} is missing"
    (newest / "manifest.json").unlink()
    assert find_latest(folder) == (previous, [])


@pytest.mark.parametrize(
    ("ranks", "change", "message"),
    [
        (2, "quantizer.decay=0.5", "quantizer.decay: 0.99 there, 0.5 here"),
    ],
)
def test_a_resume_that_cannot_work_is_refused_before_a_rank_starts(image_dataset, undisturbed, ranks, change, message):
    with pytest.raises((RecipeError, CheckpointError)) as refused:
        check_run(RECIPE, [f"data.path={image_dataset}", *OVERRIDES, change], undisturbed.path, ranks)
    assert message in str(refused.value)


def test_environment_tells_versions_and_processes(undisturbed):
    environment = json.loads(undisturbed.environment_file.read_text())
    assert environment["packages"]["torch"].startswith("2.9.1")
    assert [rank["rank"] for rank in environment["ranks"]] == [0, 1]
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
