"""SIGKILL at random moments to ranks, to torchrun, to everything at once, and to Ray's workers, nodes and driver.

What is left in the end must be what an undisturbed run leaves, bit for bit, trained on every sample once an epoch. All
processes are real; each campaign ends only those whose command line names its own folder.
"""

import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from tests.end_to_end.recorded_training import trained_keys

RECIPE = "image/autoencoder_tiny_ksom"
RANKS, MICRO_BATCHES, SAMPLES = 2, 6, 4
CHECKPOINT_EVERY = 5
SEED = 20261121
DEADLINE = 240.0  # seconds for anything that is waited for
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def _overrides(dataset: Path, steps: int) -> list[str]:
    return [
        f"data.path={dataset}",
        f"batch.micro_batches={MICRO_BATCHES}",
        f"batch.samples={SAMPLES}",
        "data.image_size=32",
        "quantizer.codes=16",
        "quantizer.grid=[4,4]",
        "model.channels=16",
        "model.residual_channels=8",
        f"training.steps={steps}",
        "training.log_every=1",
        f"training.checkpoint_every={CHECKPOINT_EVERY}",
        "training.collective_timeout=120",
        "codebooks.check_every=2",
        "schedule.warmup_steps=2",
    ]


class Campaign:
    """A run that is started again and again. A context manager: no process of it outlives the block."""

    def __init__(self, run: Path, dataset: Path, steps: int) -> None:
        self.run, self.dataset, self.steps = Run(run), dataset, steps
        self.keys = run.with_name(f"{run.name}-keys")
        self.output = run.with_name(f"{run.name}-output.txt")
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> "Campaign":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def start(self) -> subprocess.Popen:
        """torchrun with the recording trainer."""
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"),
            *("--max-restarts=0", "-m", "tests.end_to_end.recorded_training", str(self.keys), RECIPE),
            *(*_overrides(self.dataset, self.steps), "--run-dir", str(self.run.path)),
        ]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
        return self.process

    def finish(self) -> None:
        """To the end, undisturbed."""
        assert self.start().wait(DEADLINE) == 0, self.output.read_text()[-4000:]

    def processes(self) -> list[psutil.Process]:
        """Everything that works for this campaign, by its folder in the command line."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if any(str(self.run.path) in word for word in process.info["cmdline"] or []) and process.pid != os.getpid():
                found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The trainers, in no order; also while they are starting."""
        return [process for process in self.processes() if process.pid != self.process.pid]

    def attempt(self) -> int:
        log = self.run.log()
        return log[-1]["attempt"] if log else 0

    def wait_for(self, what: str, condition, pause: float = 0.05) -> bool:
        """Until it holds; False when the run ended before."""
        until = time.monotonic() + DEADLINE
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < until, f"{what} did not come: {self.output.read_text()[-4000:]}"
            time.sleep(pause)
        return True

    def kill(self, target: str, moment: str, dice: random.Random) -> bool:
        """Start, wait for the moment, kill. False when the run was faster."""
        attempt = self.attempt()
        self.start()
        if moment == "starting":
            wait = time.monotonic() + dice.uniform(0.5, 12)
            in_time = self.wait_for("the start", lambda: time.monotonic() > wait)
        elif moment == "writing":
            in_time = self.wait_for("a step", lambda: self.attempt() > attempt)
            in_time = in_time and self.wait_for("a checkpoint", self._is_writing, pause=0.001)
            time.sleep(dice.uniform(0, 0.02))
        else:
            in_time = self.wait_for("a step", lambda: self.attempt() > attempt)
            time.sleep(dice.uniform(0, 1))
        in_time = in_time and self.process.poll() is None
        ranks = sorted(self.ranks(), key=lambda process: process.pid)
        victims = {"torchrun": [], "everything": ranks, "rank": [dice.choice(ranks)] if ranks else []}[target]
        for process in victims:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if target != "rank" or not victims:
            self.process.kill()
        self.process.wait(DEADLINE)
        # The next start does not wait for what is left: ranks without torchrun save and leave.
        return in_time

    def _is_writing(self) -> bool:
        return any(self.run.checkpoints.glob(".partial-*"))


def _assert_identical(expected: Run, actual: Run) -> None:
    reference, weights = read_weights(expected.latest_checkpoint()), read_weights(actual.latest_checkpoint())
    assert expected.latest_checkpoint().name == actual.latest_checkpoint().name
    assert reference.keys() == weights.keys()
    assert any("quantizer" in name for name in weights)
    for name, tensor in reference.items():
        assert torch.equal(tensor, weights[name]), name
    losses = {line["step"]: line["loss"] for line in expected.log()}
    for line in actual.log():
        assert line["loss"] == losses[line["step"]], f"step {line['step']}, attempt {line['attempt']}"


def _assert_every_sample_once_an_epoch(campaign: Campaign) -> None:
    from pipeline.data import open_data

    data = open_data(campaign.run.recipe().data)
    known = {source.keys(index) for source in data.sources for index in range(len(source))}
    trained = trained_keys(campaign.keys)
    places = [(step, number) for step in range(campaign.steps) for number in range(MICRO_BATCHES)]
    assert set(trained) == set(places)
    keys = [key for place in places for key in trained[place]]
    assert len(keys) > len(known), "more than an epoch"
    for begin in range(0, len(keys), len(known)):
        epoch = keys[begin : begin + len(known)]
        assert len(set(epoch)) == len(epoch), "no sample twice in an epoch"
        assert set(epoch) <= known
        assert len(epoch) < len(known) or set(epoch) == known, "no sample left out"


def _campaign(folder: Path, dataset: Path, steps: int, kills: list[tuple[str, str]]) -> None:
    dice = random.Random(SEED)
    with Campaign(folder / "undisturbed", dataset, steps) as undisturbed:
        undisturbed.finish()
    with Campaign(folder / "killed", dataset, steps) as killed:
        for target, moment in kills:
            assert killed.kill(target, moment, dice), f"the run ended before {target} could be killed while {moment}"
        killed.finish()
        _assert_identical(undisturbed.run, killed.run)
        _assert_every_sample_once_an_epoch(undisturbed)
        _assert_every_sample_once_an_epoch(killed)
        assert not list(killed.run.checkpoints.glob(".*")), "nothing half-made stays"
        assert not killed.ranks()


@pytest.mark.timeout(900)
def test_a_few_kills_leave_no_trace(image_dataset, tmp_path):
    _campaign(tmp_path, image_dataset, 30, [("rank", "writing"), ("torchrun", "training")])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_kills_leave_no_trace(image_dataset, tmp_path):
    dice = random.Random(SEED)
    moments = ["starting"] * 4 + ["training"] * 9 + ["writing"] * 9
    targets = ["rank"] * 12 + ["torchrun"] * 5 + ["everything"] * 5
    dice.shuffle(moments)
    dice.shuffle(targets)
    _campaign(tmp_path, image_dataset, 400, list(zip(targets, moments, strict=True)))
