"""A run's log as curves, with the places where it was killed and resumed.

In: the lines of log.jsonl. Out: :class:`History`. Pure; no files, no figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NOT_CURVES = {"step", "attempt"}


@dataclass(frozen=True)
class History:
    """What a run logged.

    ``lines`` hold each step once, as the last attempt that reached it logged it. ``repeated`` hold the lines that
    earlier attempts had logged for the same steps. ``resumed`` are the last steps logged before each restart.
    """

    lines: list[dict[str, Any]]
    repeated: list[dict[str, Any]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Everything that was logged as a number, in the order of first appearance."""
        seen: dict[str, None] = {}
        for line in self.lines:
            seen |= dict.fromkeys(name for name, value in line.items() if _is_number(value))
        return [name for name in seen if name not in NOT_CURVES]

    @property
    def seconds(self) -> float:
        """Time spent between logged lines, repeated steps included."""
        return sum(line.get("seconds") or 0.0 for line in [*self.lines, *self.repeated])

    def curve(self, name: str, points: int = 400) -> tuple[list[float], list[float]]:
        """Steps and values of ``name``; more than ``points`` are averaged over equal runs of lines."""
        pairs = [(line["step"], line[name]) for line in self.lines if _is_number(line.get(name))]
        width = math.ceil(len(pairs) / points) if pairs else 1
        bins = [pairs[first : first + width] for first in range(0, len(pairs), width)]
        steps = [sum(step for step, _ in part) / len(part) for part in bins]
        return steps, [sum(value for _, value in part) / len(part) for part in bins]

    def repeated_points(self, name: str) -> tuple[list[float], list[float]]:
        """What earlier attempts had logged for steps that were done again."""
        pairs = [(line["step"], line[name]) for line in self.repeated if _is_number(line.get(name))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def largest_difference(self, name: str) -> float | None:
        """Largest |first value − value after the resume| over repeated steps; None when no step was repeated."""
        final = {line["step"]: line.get(name) for line in self.lines}
        differences = [
            abs(line[name] - final[line["step"]])
            for line in self.repeated
            if _is_number(line.get(name)) and _is_number(final.get(line["step"]))
        ]
        return max(differences, default=None)


def read_history(lines: Sequence[dict[str, Any]]) -> History:
    """Sort a log's lines into what stands and what a resume did over."""
    final: dict[int, dict[str, Any]] = {}
    repeated, resumed = [], []
    last: dict[str, Any] | None = None
    for line in lines:
        if last is not None and line.get("attempt", 1) != last.get("attempt", 1):
            resumed.append(last["step"])
        if line["step"] in final:
            repeated.append(final[line["step"]])
        final[line["step"]] = line
        last = line
    return History([final[step] for step in sorted(final)], repeated, resumed)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
