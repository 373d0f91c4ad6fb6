"""A rank that is slow, and one that stops for good: the others wait, say for whom, and never forever."""

import os
import re
import signal
import time
from contextlib import suppress

import pytest
import torch

from pipeline import collectives
from pipeline.training.alarms import PERSISTENT_STEPS, Alarms
from pipeline.training.throughput import Throughput
from tests.distributed.harness import run_ranks
from tests.end_to_end.campaign import Campaign, assert_identical, train_undisturbed

STEPS = 40
SLOW, SLOW_STEPS = 1, 12


@pytest.fixture(scope="module")
def undisturbed(image_dataset, tmp_path_factory):
    return train_undisturbed(tmp_path_factory.mktemp("undisturbed") / "run", image_dataset, STEPS)


def _slow_down(campaign: Campaign, rank: int) -> None:
    """Freeze the rank for most of the time of some steps."""
    pid = campaign.pid_of(rank)
    while campaign.process.poll() is None and campaign.run.log()[-1]["step"] < SLOW_STEPS:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(pid, signal.SIGCONT)
        time.sleep(0.03)


def _measure() -> dict[str, float]:
    """What the log says of a rank that needs longer than the others for its own work."""
    throughput = Throughput(torch.device("cpu"), "fp32")
    if collectives.rank() == SLOW:
        time.sleep(0.5)
    began = time.perf_counter()
    collectives.barrier()
    return throughput.read(0.0, time.perf_counter() - began)


def test_the_log_names_the_slowest_rank():
    for values in run_ranks(_measure, 3):
        assert values["slowest_rank"] == SLOW
        assert values["slowest_rank_seconds"] >= 0.5 > values["middle_rank_seconds"] > 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_slow_rank_changes_nothing_and_is_named(image_dataset, undisturbed, tmp_path):
    with Campaign(tmp_path / "slow", image_dataset, STEPS) as slow:
        slow.start()
        assert slow.wait_for("a step", lambda: slow.attempt() == 1)
        _slow_down(slow, SLOW)
        assert slow.process.wait(300) == 0, slow.output.read_text()
        assert_identical(undisturbed, slow.run)
        lines = slow.run.log()[1 : SLOW_STEPS - 1]
        named = [line["slowest_rank"] for line in lines]
        assert named.count(SLOW) > len(named) / 2, named
        assert all(line["slowest_rank_seconds"] >= line["middle_rank_seconds"] > 0 for line in lines)
        assert all(line["slowest_rank_seconds"] <= line["seconds"] for line in lines)


def test_a_rank_that_stays_slow_is_warned_of():
    alarms = Alarms()
    short = {"slowest_rank": 0, "slowest_rank_seconds": 0.15, "middle_rank_seconds": 0.04}
    assert not any(alarms.warnings(step, short, []) for step in range(10))
    even = {"slowest_rank": 0, "slowest_rank_seconds": 1.1, "middle_rank_seconds": 1.0}
    slow = {"slowest_rank": 3, "slowest_rank_seconds": 2.1, "middle_rank_seconds": 1.0}
    assert not any(alarms.warnings(step, even, []) for step in range(10))
    said = [alarms.warnings(step, slow, []) for step in range(PERSISTENT_STEPS)]
    assert not any(said[:-1]), "once is no habit"
    (message,) = said[-1]
    assert message.startswith("rank 3 took 2.1 seconds for what takes the middle rank 1,")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_rank_that_stops_for_good_ends_the_run_in_time(image_dataset, undisturbed, tmp_path):
    """torchrun gives a rank that does not end 30 s after SIGTERM, which a stopped process does not hear, and kills."""
    with Campaign(tmp_path / "frozen", image_dataset, STEPS, "training.collective_timeout=10") as frozen:
        for attempt, rank in ((1, 1), (2, 0)):
            frozen.start()
            assert frozen.wait_for("a step", lambda attempt=attempt: frozen.attempt() == attempt)
            os.kill(frozen.pid_of(rank), signal.SIGSTOP)
            assert frozen.process.wait(300) == 1, "torchrun ended: a rank failed"
            assert not frozen.ranks()
            words = frozen.output.read_text()
            other = 1 - rank
            assert re.search(rf"error: rank {other} on .* lost another rank: .*Timed out", words), words
            assert f"rank {rank}: process {frozen.pid_of(rank)} on " in words
        frozen.finish()
        assert_identical(undisturbed, frozen.run)
