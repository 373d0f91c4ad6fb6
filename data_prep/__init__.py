"""From a tree of files to a data set: scan → check → shard → manifest, as Ray tasks. Names are loaded when first
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_prep.failure import PreparationError, PreparationStopped
    from data_prep.preparation import PreparationSummary, prepare
    from data_prep.progress import PreparationProgress
    from data_prep.shard_plan import parse_splits
    from data_prep.verification import Problem, verify

__all__ = [
    "prepare",
    "verify",
    "parse_splits",
    "PreparationSummary",
    "PreparationProgress",
    "PreparationError",
    "PreparationStopped",
    "Problem",
]

_HOME = {
    "prepare": "preparation",
    "PreparationSummary": "preparation",
    "PreparationError": "failure",
    "PreparationStopped": "failure",
    "PreparationProgress": "progress",
    "parse_splits": "shard_plan",
    "verify": "verification",
    "Problem": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
