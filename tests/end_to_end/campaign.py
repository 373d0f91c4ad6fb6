"""A real training under torchrun that a test kills, freezes or misleads, and what must be left of it in the end.

In: a run folder, a data set, a number of steps. Out: :class:`Campaign`, and the comparison with a run that was left
alone.
"""

import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from tests.conftest import SMALL_IMAGE
from tests.distributed.harness import run_ranks
from tests.end_to_end.recorded_training import trained_keys

RECIPE = "image/autoencoder_tiny_ksom"
RANKS, MICRO_BATCHES = 2, 6
FEW_STEPS, MANY_STEPS = 12, 400
CHECKPOINT_EVERY = 5
DEADLINE = 400.0  # seconds for anything that is waited for
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def overrides(dataset: Path, steps: int) -> list[str]:
    """Of the recipe, for a run that is small and long enough."""
    return [
        f"data.path={dataset}",
        *SMALL_IMAGE,
        f"batch.micro_batches={MICRO_BATCHES}",
        f"training.steps={steps}",
        f"training.checkpoint_every={CHECKPOINT_EVERY}",
        "training.collective_timeout=120",
        "codebooks.check_every=2",
    ]


class Campaign:
    """A run that is started again and again. A context manager: no process of it outlives the block."""

    def __init__(
        self, run: Path, dataset: Path, steps: int, *more: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """``more``: further overrides."""
        self.run, self.dataset, self.steps = Run(run), dataset, steps
        self.overrides = [*overrides(dataset, steps), *more]
        self.environment = ENVIRONMENT | dict(environment or {})
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
            *(*self.overrides, "--run-dir", str(self.run.path)),
        ]
        with self.output.open("a") as output:
            self.process = subprocess.Popen(command, env=self.environment, stdout=output, stderr=subprocess.STDOUT)
        return self.process

    def finish(self) -> None:
        """To the end, from where it is."""
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

    def step(self) -> int:
        log = self.run.log()
        return log[-1]["step"] if log else 0

    def pid_of(self, rank: int) -> int:
        """Of the last start that came to train."""
        return self.run.environment()["ranks"][rank]["pid"]

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
        in_time = self.wait_for_moment(moment, attempt, dice)
        print(f"{time.strftime('%H:%M:%S')} {target} while {moment}, after step {self.step()}", flush=True)
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

    def wait_for_moment(self, moment: str, attempt: int, dice: random.Random) -> bool:
        """Until the start that follows ``attempt`` is at the moment; False when the run ended before."""
        if moment == "starting":
            until = time.monotonic() + dice.uniform(0.5, 12)
            in_time = self.wait_for("the start", lambda: time.monotonic() > until)
        else:
            in_time = self.wait_for("a step", lambda: self.attempt() > attempt)
            if moment == "writing":
                in_time = in_time and self.wait_for("a checkpoint", self._is_writing, pause=0.001)
            time.sleep(dice.uniform(0, 0.02 if moment == "writing" else 1))
        return in_time and self.process.poll() is None

    def _is_writing(self) -> bool:
        return any(self.run.checkpoints.glob(".partial-*"))


def assert_identical(expected: Run, actual: Run) -> None:
    reference, weights = read_weights(expected.latest_checkpoint()), read_weights(actual.latest_checkpoint())
    assert expected.latest_checkpoint().name == actual.latest_checkpoint().name
    assert reference.keys() == weights.keys()
    assert any("quantizer" in name for name in weights)
    for name, tensor in reference.items():
        assert torch.equal(tensor, weights[name]), name
    losses = {line["step"]: line["loss"] for line in expected.log()}
    for line in actual.log():
        assert line["loss"] == losses[line["step"]], f"step {line['step']}, attempt {line['attempt']}"


def assert_every_sample_once_an_epoch(campaign: Campaign) -> None:
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


def train_undisturbed(run: Path, dataset: Path, steps: int) -> Run:
    """The same training without torchrun, on processes that start faster."""
    run_ranks(_train, RANKS, run, overrides(dataset, steps), timeout=DEADLINE)
    return Run(run)


def _train(run: Path, overrides: list[str]) -> None:
    from pipeline.training import train
    from recipes.schema import load_recipe

    train(load_recipe(RECIPE, overrides), run)
