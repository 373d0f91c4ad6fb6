"""A rank that died, hangs or can't be reached, told in words.

In: what torch raises on the ranks that wait for it, after ``training.collective_timeout`` seconds at the latest. Out: a
:class:`PeerLost` that says what to look at; the cause is on another rank, so the library's own words don't.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    from recipes.schema import Recipe

_WORDS = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe", re.IGNORECASE)


class PeerLost(RuntimeError):
    """Another rank is gone or does not answer."""


def explained(train: Callable[..., Run]) -> Callable[..., Run]:
    """Decorator of ``train(recipe, run_dir, …)``: raises :class:`PeerLost` for errors of the process group."""

    @functools.wraps(train)
    def wrapped(recipe: Recipe, run_dir: str | Path, **options: Any) -> Run:
        try:
            return train(recipe, run_dir, **options)
        except RuntimeError as error:
            if not _is_of_the_process_group(error):
                raise
            raise PeerLost(describe(error, Run(run_dir), recipe.training.collective_timeout)) from error

    return wrapped


def describe(error: BaseException, run: Run, timeout: int) -> str:
    """What the user reads."""
    here = os.environ.get("RANK", "0")
    others = [_place(rank) for rank in _ranks(run) if str(rank["rank"]) != here]
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"rank {here} on {socket.gethostname()} lost another rank: {first}\n"
        f"look at the others first ({'; '.join(others) or 'none has joined yet'}): one that died has said why, or was "
        "killed (for memory: dmesg); one that hangs shows where with `py-spy dump --pid`. If all are well, a step or a "
        f"checkpoint takes longer than training.collective_timeout={timeout} seconds (raise it), or they can't reach "
        "one another: name the network interface that joins the machines in GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME "
        "with GPUs). The same command goes on from the last checkpoint"
    )


def _is_of_the_process_group(error: RuntimeError) -> bool:
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    # gloo raises bare RuntimeErrors.
    return type(error) is RuntimeError and bool(_WORDS.search(str(error)))


def _ranks(run: Run) -> list[dict[str, Any]]:
    """As the last start wrote them: this one, unless it is still in its first seconds."""
    try:
        return run.environment()["ranks"]
    except (OSError, json.JSONDecodeError, KeyError):
        return []


def _place(rank: dict[str, Any]) -> str:
    return f"rank {rank['rank']}: process {rank['pid']} on {rank['host']}"
