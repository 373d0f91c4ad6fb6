"""SIGKILL at random moments to ranks, to torchrun, to everything at once, and to Ray's workers, nodes and driver.

What is left in the end must be what an undisturbed run leaves, bit for bit, trained on every sample once an epoch. All
processes are real; each campaign ends only those that it started: by its folder in their command line, or by the
sessions of its own Ray.
"""

import random
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from pipeline.training.run_folder import Run
from tests.data_prep.processes import RAYLET, Session, session
from tests.data_prep.test_cluster import free_ports, ray_node
from tests.data_prep.test_interruption import TESSERA
from tests.end_to_end.campaign import (
    DEADLINE,
    FEW_STEPS,
    MANY_STEPS,
    RANKS,
    RECIPE,
    Campaign,
    assert_every_sample_once_an_epoch,
    assert_identical,
    train_undisturbed,
)
from tests.end_to_end.recorded_training import worker_environment

ROOT = Path(__file__).parents[2]
SEED = 20261121
RAY_RANK = "ray::RayTrainWorker"  # what Ray calls the process of a rank


class RayCampaign(Campaign):
    """A run under a Ray cluster of a head without CPUs and a node for each rank. A node that died comes back, as a
    machine does that is started again; the driver goes on, unless it was a victim itself."""

    def __enter__(self) -> "RayCampaign":
        self._stack = ExitStack()
        self._started = 0
        self._killed_attempt = 0
        try:
            # Unix sockets need a short path.
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
            port, client = free_ports(2)
            self._address = f"127.0.0.1:{port}"
            ports = [f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
            self._ray_node("--head", *ports, f"--temp-dir={folder}", "--num-cpus=0")
            self._nodes = [self._rank_node() for _ in range(RANKS)]
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self) -> subprocess.Popen:
        command = [*TESSERA, "launch", RECIPE, *self.overrides, "--run", str(self.run.path), "--on", "ray"]
        command += ["--ray-address", self._address, "--ranks-per-node", str(RANKS), "--failures", "100"]
        self._started += 1
        self.output = self.output.with_name(f"driver-{self._started}.txt")
        self._driver = self._stack.enter_context(session(command, self.output))
        self.process = self._driver.process
        return self.process

    def finish(self) -> None:
        if self.process is None or self.process.poll() is not None:
            self.start()
        assert self.process.wait(DEADLINE) == 0, self.output.read_text()[-4000:]

    def ranks(self) -> list[psutil.Process]:
        found = []
        for pid in sorted(pid for node in self._nodes for pid in node.processes(RAY_RANK)):
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def kill(self, target: str, moment: str, dice: random.Random) -> bool:
        """Wait for the moment, kill, and bring back what Ray itself does not."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        in_time = self.wait_for_moment(moment, self._killed_attempt, dice)
        print(f"{time.strftime('%H:%M:%S')} {target} while {moment}, after step {self.step()}", flush=True)
        if target == "rank":
            in_time = in_time and self.wait_for("a rank", self.ranks)
            dice.choice(self.ranks()).kill()
        if target in ("driver", "everything"):
            self._driver.kill()
            self.process.wait()
        if target in ("node", "everything"):
            places = range(RANKS) if target == "everything" else [dice.randrange(RANKS)]
            assert all(self._nodes[place].kill(RAYLET) for place in places)
            for place in places:
                self._nodes[place] = self._rank_node()
        self._killed_attempt = self.attempt()
        return in_time

    def _rank_node(self) -> Session:
        return self._ray_node(f"--address={self._address}", "--num-cpus=1")

    def _ray_node(self, *options: str) -> Session:
        until = time.monotonic() + DEADLINE
        while True:
            self._started += 1
            place = self.run.path.with_name(f"node-{self._started}")
            place.mkdir()
            try:
                return self._stack.enter_context(ray_node(place, "ray", "--node-ip-address=127.0.0.1", *options))
            except AssertionError:  # a machine that is too busy for Ray to start in time
                if time.monotonic() > until:
                    raise


@pytest.fixture(scope="module")
def undisturbed(image_dataset, tmp_path_factory):
    """The run that nobody kills, by its number of steps; each trained when it is first asked for."""
    runs = {}

    def get(steps: int) -> Run:
        if steps not in runs:
            runs[steps] = train_undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", image_dataset, steps)
        return runs[steps]

    return get


def _check(killed: Campaign, undisturbed: Run) -> None:
    assert_identical(undisturbed, killed.run)
    assert_every_sample_once_an_epoch(killed)
    assert not list(killed.run.checkpoints.glob(".*")), "nothing half-made stays"
    assert not killed.ranks()


def _kill_again_and_again(killed: Campaign, kills: list[tuple[str, str]]) -> None:
    dice = random.Random(SEED)
    for target, moment in kills:
        assert killed.kill(target, moment, dice), f"the run ended before {target} could be killed while {moment}"
    killed.finish()


def _shuffled(targets: dict[str, int], moments: dict[str, int]) -> list[tuple[str, str]]:
    dice = random.Random(SEED)
    whom, when = list(Counter(targets).elements()), list(Counter(moments).elements())
    dice.shuffle(whom)
    dice.shuffle(when)
    return list(zip(whom, when, strict=True))


@pytest.mark.slow  # tests/training/test_promise.py has a kill among the fast ones
@pytest.mark.timeout(900)
def test_a_kill_leaves_no_trace(image_dataset, undisturbed, tmp_path):
    with Campaign(tmp_path / "killed", image_dataset, FEW_STEPS) as killed:
        _kill_again_and_again(killed, [("rank", "writing")])
        _check(killed, undisturbed(FEW_STEPS))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_twenty_kills_leave_no_trace(image_dataset, undisturbed, tmp_path):
    kills = _shuffled({"rank": 12, "torchrun": 5, "everything": 5}, {"starting": 4, "training": 9, "writing": 9})
    with Campaign(tmp_path / "killed", image_dataset, MANY_STEPS) as killed:
        _kill_again_and_again(killed, kills)
        _check(killed, undisturbed(MANY_STEPS))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_under_ray_leave_no_trace(image_dataset, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the workers import this checkout
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default 15: on a busy machine they would hardly start
    kills = _shuffled(
        {"rank": 5, "node": 3, "driver": 3, "everything": 1}, {"starting": 3, "training": 4, "writing": 5}
    )
    with RayCampaign(tmp_path / "killed", image_dataset, MANY_STEPS) as killed:
        for name, value in worker_environment(killed.keys).items():
            monkeypatch.setenv(name, value)
        _kill_again_and_again(killed, kills)
        _check(killed, undisturbed(MANY_STEPS))
        drivers = [file.read_text() for file in tmp_path.glob("driver-*.txt")]
        assert not any("left alone" in text for text in drivers), "Ray ended its workers each time"
