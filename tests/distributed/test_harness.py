"""The harness itself: results by rank, tracebacks, and no process left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from pipeline import collectives
from tests.distributed.harness import RankError, run_ranks


def _speak(word: str) -> tuple[str, int, float]:
    total = collectives.all_reduce_sum(torch.tensor([float(collectives.rank() + 1)]))
    return word, collectives.rank(), float(total)


def _fail_on_one() -> None:
    if collectives.rank() == 1:
        raise ValueError("rank one has had enough")
    collectives.barrier()


def _die_on_one() -> None:
    if collectives.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _differ() -> str:
    with pytest.raises(RuntimeError) as caught:
        collectives.check_same(collectives.rank() // 2, "halves")
    return str(caught.value)


def _sleep() -> None:
    time.sleep(60)


def _collectives() -> dict[str, object]:
    rank = collectives.rank()
    largest = collectives.all_reduce_max(torch.tensor([rank, -rank]))
    return {
        "max": largest.tolist(),
        "broadcast": collectives.broadcast(torch.tensor([rank]), source=1).tolist(),
        "gather": collectives.all_gather(torch.tensor([rank, 7])).tolist(),
        "objects": collectives.all_gather_objects({"rank": rank}),
        "differ": _differ(),
    }


def test_results_come_by_rank():
    assert run_ranks(_speak, 2, "hello") == [("hello", 0, 3.0), ("hello", 1, 3.0)]


def test_every_collective_on_three_ranks():
    for result in run_ranks(_collectives, 3):
        assert result == {
            "max": [2, 0],
            "broadcast": [1],
            "gather": [[0, 7], [1, 7], [2, 7]],
            "objects": [{"rank": 0}, {"rank": 1}, {"rank": 2}],
            "differ": "halves differ between ranks (rank 0: 0, rank 1: 0, rank 2: 1): every rank must bring the same",
        }


def test_without_a_group_there_is_one_rank():
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    value = torch.tensor([3.0])
    assert collectives.all_reduce_sum(value) is value
    assert collectives.all_gather(value).tolist() == [[3.0]]
    assert collectives.all_gather_objects("x") == ["x"]
    collectives.check_same("x", "letters")
    collectives.barrier()


@pytest.mark.parametrize(
    ("function", "message"),
    [(_fail_on_one, "rank one has had enough"), (_die_on_one, r"rank 1 of 2 died with exit code -9")],
)
def test_a_failing_rank_ends_all(function, message):
    with pytest.raises(RankError, match=message):
        run_ranks(function, 2, timeout=60)
    assert not multiprocessing.active_children()


def test_ranks_that_hang_are_killed():
    with pytest.raises(RankError, match=r"did not end within 3 s"):
        run_ranks(_sleep, 1, timeout=3)
    assert not multiprocessing.active_children()
