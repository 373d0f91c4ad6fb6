"""What a run is worth: metrics over a whole split, and a report to look at. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.metrics import downstream_table, evaluate, metrics_table, networks_told
    from pipeline.evaluation.report import write_report

__all__ = ["downstream_table", "evaluate", "metrics_table", "networks_told", "write_report"]

_HOME = {
    "downstream_table": "metrics",
    "evaluate": "metrics",
    "metrics_table": "metrics",
    "networks_told": "metrics",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
