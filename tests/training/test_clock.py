"""The system's clock jumps while a run trains, and between a save and its resume: nothing depends on it."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.campaign import CHECKPOINT_EVERY, Campaign, assert_identical, train_undisturbed

COMPILER = shutil.which("cc")
STEPS = 60
KEPT = 3
HOUR, DAY = 3600, 86400

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler (cc) for jumping_clock.c: apt-get install gcc"),
]


class Clock:
    """The time of day of the processes that get its environment."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "jumping_clock.so", folder / "clock"
        source = Path(__file__).with_name("jumping_clock.c")
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(source)], check=True)
        self.jump(0)
        self.environment = {"LD_PRELOAD": str(library), "JUMPING_CLOCK": str(self._file)}

    def jump(self, seconds: int) -> None:
        """To so far from the real time."""
        self._file.touch()
        with self._file.open("r+b") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


@pytest.fixture
def clock(tmp_path):
    return Clock(tmp_path)


def test_the_clock_jumps_and_the_monotonic_one_does_not(clock):
    code = (
        "import time; print(time.time(), time.monotonic(), flush=True); input(); print(time.time(), time.monotonic())"
    )
    environment = os.environ | clock.environment
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    before = [float(word) for word in process.stdout.readline().split()]
    clock.jump(-HOUR)
    after = [float(word) for word in process.communicate("\n")[0].split()]
    assert before[0] - HOUR <= after[0] < before[0] - HOUR / 2
    assert before[1] <= after[1] < before[1] + HOUR / 2


def _wait_for_step(campaign: Campaign, step: int) -> None:
    assert campaign.wait_for(f"step {step}", lambda: any(line["step"] >= step for line in campaign.run.log()))


def test_a_clock_that_jumps_changes_nothing(image_dataset, clock, tmp_path):
    undisturbed = train_undisturbed(tmp_path / "undisturbed", image_dataset, STEPS)
    more = [f"training.keep_checkpoints={KEPT}"]
    with Campaign(tmp_path / "jumping", image_dataset, STEPS, *more, environment=clock.environment) as jumping:
        jumping.start()
        _wait_for_step(jumping, 5)
        clock.jump(-HOUR)
        _wait_for_step(jumping, 12)
        clock.jump(DAY)
        _wait_for_step(jumping, 20)
        os.kill(jumping.pid_of(0), signal.SIGUSR1)
        jumping.process.wait(60)
        assert jumping.run.log()[-1]["step"] < STEPS, "stopped and saved"
        clock.jump(-2 * HOUR)
        os.utime(jumping.run.list_checkpoints()[-1], (0, 0))  # written under a clock that was never set
        jumping.finish()
        assert_identical(undisturbed, jumping.run)
        lines = jumping.run.log()
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert all(0 < line["seconds"] < 600 for line in lines)
        assert all(line["samples_per_second"] > 0 for line in lines)
        assert all(0 <= line["data_wait_share"] <= 1 and 0 <= line["all_reduce_share"] <= 1 for line in lines)
        kept = jumping.run.list_checkpoints()
        newest = [STEPS - CHECKPOINT_EVERY * number for number in range(KEPT)]
        assert [path.name for path in kept] == [f"step-{step:08d}" for step in reversed(newest)]
