"""Real ranks for tests: processes that form a gloo group on this machine.

In: a function of a module, the number of ranks, its arguments. Out: what it returned on each rank. Processes never
outlive the call.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any


class RankError(AssertionError):
    """A rank raised or vanished; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks of a gloo group and return their results, by rank.

    ``function`` stands at the top of a module, arguments and results can be pickled; ``pipeline.collectives`` knows the
    rank. Raises :class:`RankError` with the first failing rank's traceback, and after ``timeout`` seconds.
    """
    # A server that has loaded torch once forks the ranks: they start in milliseconds, and inherit nothing of the tests.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "pipeline.codebooks"])
    port = _free_port()
    ranks, readers = [], {}
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        rank_process = context.Process(
            target=_run_rank, args=(writer, function, rank, world_size, port, timeout, args), daemon=True
        )
        ranks.append(rank_process)
        readers[reader] = rank
    try:
        for rank_process in ranks:
            rank_process.start()
        return _collect(ranks, readers, time.monotonic() + timeout, timeout)
    finally:
        for rank_process in ranks:
            if rank_process.is_alive():
                rank_process.kill()
            if rank_process.pid is not None:
                rank_process.join()


def _collect(ranks: list[Any], readers: dict[Connection, int], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(ranks):
        waiting = [reader for reader, rank in readers.items() if rank not in results]
        sentinels = [rank_process.sentinel for rank, rank_process in enumerate(ranks) if rank not in results]
        ready = wait([*waiting, *sentinels], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(ranks)) if rank not in results]
            raise RankError(f"ranks {missing} of {len(ranks)} did not end within {timeout} s")
        for reader in waiting:
            rank = readers[reader]
            if not reader.poll():
                if ranks[rank].sentinel in ready and not reader.poll():
                    raise RankError(f"rank {rank} of {len(ranks)} died with exit code {ranks[rank].exitcode}")
                continue
            try:
                succeeded, value = reader.recv()
            except EOFError:
                ranks[rank].join(1)
                raise RankError(f"rank {rank} of {len(ranks)} died with exit code {ranks[rank].exitcode}") from None
            if not succeeded:
                raise RankError(f"rank {rank} of {len(ranks)} raised:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _run_rank(
    writer: Connection,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    os.environ.update(
        {
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )
    try:
        import torch
        from torch import distributed

        torch.set_num_threads(1)
        distributed.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        result = function(*args)
        # a rank that leaves early takes the store along, while others may still be in a collective
        distributed.barrier()
        distributed.destroy_process_group()
        writer.send((True, result))
    except BaseException:
        writer.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    finally:
        writer.close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
