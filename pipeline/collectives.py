"""The only place that talks to other ranks.

In: tensors, small picklable objects. Out: the same, reduced, gathered or compared over ranks. Each function does
nothing where there is one rank, with or without a process group. ``group`` is a torch process group; none means all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = Any


def rank(group: Group = None) -> int:
    """This process's place in the group, 0 without one."""
    return dist.get_rank(group) if _initialised() else 0


def world_size(group: Group = None) -> int:
    """Number of ranks in the group, 1 without one."""
    return dist.get_world_size(group) if _initialised() else 1


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum ``tensor`` over ranks, in place; returns it. Shapes and dtypes must agree."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def all_reduce_max(tensor: Tensor, group: Group = None) -> Tensor:
    """Largest value over ranks of each element, in place; returns the tensor."""
    if world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def broadcast(tensor: Tensor, source: int = 0, group: Group = None) -> Tensor:
    """Overwrite ``tensor`` by that of rank ``source`` of the group, in place; returns it."""
    if world_size(group) > 1:
        dist.broadcast(tensor, group_src=source, group=group)
    return tensor


def all_gather(tensor: Tensor, group: Group = None) -> Tensor:
    """Every rank's tensor, stacked: ``(...)`` → ``(world, ...)``. Shapes and dtypes must agree."""
    if world_size(group) == 1:
        return tensor.unsqueeze(0)
    parts = [torch.empty_like(tensor) for _ in range(world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def all_gather_objects(value: Any, group: Group = None) -> list[Any]:
    """Every rank's picklable object, by rank."""
    if world_size(group) == 1:
        return [value]
    gathered: list[Any] = [None] * world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def barrier(group: Group = None) -> None:
    """Wait until every rank is here."""
    if world_size(group) > 1:
        dist.barrier(group=group)


def leave() -> None:
    """Wait until every rank is here, then end the process group: nobody's last collective loses its peer."""
    if _initialised():
        barrier()
        dist.destroy_process_group()


def check_same(value: str | int, what: str, group: Group = None) -> None:
    """Raise RuntimeError on every rank, with each rank's value, unless all ranks bring the same ``value``.

    A check before a collective turns a difference between ranks into an error instead of a hang.
    """
    values = all_gather_objects(value, group)
    if any(other != values[0] for other in values):
        listed = ", ".join(f"rank {place}: {other!r}" for place, other in enumerate(values))
        raise RuntimeError(f"{what} differ between ranks ({listed}): every rank must bring the same")


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
