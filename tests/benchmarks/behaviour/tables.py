"""Figures of several seeds as one line of a markdown table, the specification's beside ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def mean(values: Iterable[float]) -> float:
    """Over seeds; NaN where one of them is."""
    return statistics.fmean(values)


def figure(value: float) -> str:
    """Three digits as the specification writes them, four of what is below .1: .0218, .325, 27.2, 465."""
    if math.isnan(value):
        return "n/a"
    if value and abs(value) < 0.1:
        text = f"{value:.4f}"
    else:
        text = f"{value:.{max(0, 3 - len(str(int(abs(value)))) if abs(value) >= 1 else 3)}f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def beside(values: Iterable[float], specified: str) -> str:
    """Ours and, in brackets, the specification's if it has one."""
    ours = figure(mean(values))
    return f"{ours} ({specified})" if specified else ours


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
