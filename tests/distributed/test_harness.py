"""The harness itself: results by rank, tracebacks, deaths and lateness, and no process left behind."""

import multiprocessing
import os
import time

import pytest
import torch

from pipeline import collectives
from tests.distributed.harness import RankFailure, run_ranks


def _collectives():
    rank = collectives.rank()
    total = torch.tensor([1.0 + rank, 10.0 * rank])
    collectives.all_reduce_sum(total)
    largest = collectives.all_reduce_max(torch.tensor([float(rank)]))
    chosen = collectives.broadcast(torch.tensor([rank]), source=1)
    gathered = collectives.all_gather(torch.tensor([rank, -rank]))
    collectives.barrier()
    collectives.check_same("equal", "what all ranks bring")
    try:
        collectives.check_same(rank, "the rank's number")
    except RuntimeError as error:
        message = str(error)
    return {
        "world": collectives.world_size(),
        "total": total,
        "largest": largest,
        "chosen": chosen,
        "gathered": gathered,
        "objects": collectives.all_gather_objects({"rank": rank}),
        "message": message,
        "threads": torch.get_num_threads(),
    }


def _fail_on_rank_1():
    if collectives.rank() == 1:
        raise ValueError("only here")
    collectives.barrier()


def _die_on_rank_1():
    if collectives.rank() == 1:
        os._exit(7)
    collectives.barrier()


def _sleep():
    time.sleep(600)


def test_collectives_and_results_by_rank():
    results = run_ranks(_collectives, 2)
    for result in results:
        assert result["world"] == 2
        assert result["total"].tolist() == [3.0, 10.0]
        assert result["largest"].tolist() == [1.0]
        assert result["chosen"].tolist() == [1]
        assert result["gathered"].tolist() == [[0, 0], [1, -1]]
        assert result["objects"] == [{"rank": 0}, {"rank": 1}]
        assert "the rank's number" in result["message"]
        assert "rank 1: 1" in result["message"]
        assert result["threads"] == 1


def test_collectives_do_nothing_on_one_process():
    tensor = torch.tensor([3.0])
    assert collectives.all_reduce_sum(tensor) is tensor
    assert collectives.broadcast(tensor) is tensor
    assert collectives.all_gather(tensor).tolist() == [[3.0]]
    assert collectives.all_gather_objects("a") == ["a"]
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    collectives.check_same("a", "anything")


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (_fail_on_rank_1, 60, "rank 1 raised:(.|\n)*only here"),
        (_die_on_rank_1, 60, "rank 1 died with exit code 7|rank 0 raised"),
        (_sleep, 6, "did not finish in 6 s"),
    ],
)
def test_failures_are_told_and_nothing_stays_behind(function, timeout, message):
    started = time.monotonic()
    with pytest.raises(RankFailure, match=message):
        run_ranks(function, 2, timeout=timeout)
    assert time.monotonic() - started < 45
    assert not multiprocessing.active_children()
