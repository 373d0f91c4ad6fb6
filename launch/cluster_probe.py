"""What `tessera doctor --cluster` runs on the nodes: a process that tells what its node has and times all-reduces.

In: a folder to look at, the other ranks' meeting place. Out: plain values. Several of them are ranks of a process group
as training would make it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import socket
import time
from collections.abc import Sequence
from typing import Any

SIZES = (4 * 2**10, 2**20, 16 * 2**20, 64 * 2**20)
"""Bytes of the summed tensors: a small one for the latency, the others for what gradients see."""
_SECONDS_PER_SIZE = 0.5
_LONGEST = 3.0
"""Seconds for one all-reduce beyond which no larger one is tried."""


class Probe:
    """One process on one node; Ray makes an actor of it."""

    def look(self, folder: str) -> dict[str, Any]:
        """Host, versions, and :class:`launch.doctor.Finding` fields of the machine's own probes."""
        from pathlib import Path

        from launch import doctor
        from pipeline.training.environment import package_versions

        probes = [doctor.find_versions, doctor.find_cores, doctor.find_memory, doctor.find_shared_memory]
        findings = [finding for probe in probes for finding in probe()] + doctor.find_disk(Path(folder))
        return {
            "host": socket.gethostname(),
            "versions": {"python": platform.python_version(), **package_versions()},
            "findings": [dataclasses.asdict(finding) for finding in findings],
        }

    def clock(self) -> float:
        """Seconds since 1970, by this node."""
        return time.time()

    def meeting_place(self) -> tuple[str, int]:
        """Address of this node in Ray's network, and a port that is free there."""
        import ray

        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def time_all_reduce(self, rank: int, world_size: int, place: tuple[str, int], timeout: float) -> dict[int, float]:
        """Seconds of one all-reduce by size in bytes, the slowest rank's; the same on every rank.

        Raises RuntimeError when the ranks do not meet, or one is lost.
        """
        import datetime

        import ray
        import torch
        from torch import distributed

        from pipeline.training.interface import use_interface_towards

        use_interface_towards(ray.util.get_node_ip_address())
        cuda = torch.cuda.is_available()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        distributed.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"tcp://{place[0]}:{place[1]}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        try:
            return time_all_reduce(torch.device("cuda") if cuda else torch.device("cpu"))
        finally:
            distributed.destroy_process_group()


def time_all_reduce(device: Any, sizes: Sequence[int] = SIZES) -> dict[int, float]:
    """Seconds of one all-reduce over all ranks of the process group by size in bytes, the slowest rank's. Larger sizes
    than one that took long are left out."""
    import torch

    times: dict[int, float] = {}
    for size in sizes:
        tensor = torch.zeros(size // 4, device=device)
        took = _slowest(tensor, 1)  # the first also makes connections
        took = _slowest(tensor, max(1, min(100, int(_SECONDS_PER_SIZE / took)))) if took < _LONGEST else took
        times[size] = took
        if took > _LONGEST / 4:
            break
    return times


def _slowest(tensor: Any, repetitions: int) -> float:
    import torch

    from pipeline import collectives

    collectives.barrier()
    began = time.perf_counter()
    for _ in range(repetitions):
        collectives.all_reduce_sum(tensor)
    if tensor.is_cuda:
        torch.cuda.synchronize()
    seconds = torch.tensor([(time.perf_counter() - began) / repetitions], device=tensor.device)
    return float(collectives.all_reduce_max(seconds))
