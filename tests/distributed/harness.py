"""Runs a function on several real processes that form a gloo process group.

In: a module-level function and its arguments. Out: each rank's result. Leaves no process behind: when a rank fails,
dies or is late, all are killed and the caller gets the rank's own traceback.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "pipeline.codebooks"]  # the third: for torch.optim
if Path("/sys/class/net/lo").exists():
    ENVIRONMENT["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name may not resolve


class RankFailure(RuntimeError):
    """A rank raised, died or did not finish in time; the message says which and holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``function(*args)`` on ``world_size`` ranks; results by rank. Raises :class:`RankFailure`.

    The ranks meet through a file and pick free ports themselves. They see RANK, WORLD_SIZE and LOCAL_RANK.
    """
    # A server that has imported torch once forks the ranks: they start in a fraction of the seconds an import takes,
    # and none inherits anything of the test's own process.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, __name__])
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        processes, connections = [], {}
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_rank, args=(theirs, function, args, rank, world_size, f"{folder}/store", timeout)
                )
                process.start()
                theirs.close()
                processes.append(process)
                connections[ours] = rank
            deadline = time.monotonic() + timeout
            while len(results) < world_size:
                ready = wait(list(connections), timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    late = sorted(set(range(world_size)) - results.keys())
                    raise RankFailure(f"ranks {late} of {world_size} did not finish in {timeout} s")
                for connection in ready:
                    assert isinstance(connection, Connection)
                    rank = connections.pop(connection)
                    results[rank] = _receive(connection, rank, processes[rank])
            for process in processes:
                process.join(timeout=max(1.0, deadline - time.monotonic()))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            for process in processes:
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]


def _receive(connection: Connection, rank: int, process: Any) -> Any:
    try:
        succeeded, content = connection.recv()
    except EOFError:
        process.join(5)
        raise RankFailure(f"rank {rank} died with exit code {process.exitcode}") from None
    if not succeeded:
        raise RankFailure(f"rank {rank} raised:\n{content}")
    return torch.load(io.BytesIO(content), weights_only=False)


def _run_rank(
    connection: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    store: str,
    timeout: float,
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        # Bytes instead of tensors: those would be passed as shared memory, which ends with this process.
        buffer = io.BytesIO()
        torch.save(result, buffer)
        torch.distributed.barrier()
        connection.send((True, buffer.getvalue()))
        torch.distributed.destroy_process_group()
    except BaseException:
        connection.send((False, traceback.format_exc()))
