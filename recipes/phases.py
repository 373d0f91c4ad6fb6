"""Phases: what one run trains in turn, each starting with the weights of the one before.

In: a recipe's mapping with a section ``phases``, a list of what each changes of the rest. Out: the whole mapping of
each phase; and the other way round.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recipes.overrides import RecipeError, assign, flatten

SHORT = {"quantizer": "quantizer.kind", "steps": "training.steps", "initialise": "codebooks.initialise"}
"""What a phase may say for short, as in ``{quantizer: identity, steps: 500}``."""


def take_phases(values: dict[str, Any], source: str) -> list[dict[str, Any]]:
    """Remove the section ``phases``: what each phase changes, by dotted key."""
    phases = values.pop("phases", None) or []
    if not isinstance(phases, list | tuple) or not all(isinstance(phase, Mapping) for phase in phases):
        raise RecipeError(
            f"{source}: phases={phases!r} is no list of mappings: use for example "
            "[{quantizer: identity, steps: 500}, {initialise: kmeans}]"
        )
    return [_expanded(phase) for phase in phases]


def override_phase(phases: Sequence[dict[str, Any]], key: str, value: Any) -> None:
    """Apply ``phases.N.KEY=VALUE``; N counts from 0, as in the list."""
    _, place, *rest = key.split(".")
    if not place.isdecimal() or int(place) >= len(phases) or not rest:
        places = ", ".join(str(number) for number in range(len(phases)))
        raise RecipeError(
            f"override {key}={value}: the recipe has {len(phases)} phases"
            + (f": use phases.N.KEY=VALUE with N of {places}" if phases else ": give them with phases=[…, …]")
        )
    phases[int(place)] |= _expanded({".".join(rest): value})


def check_overrides(phases: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> None:
    """Raise :class:`RecipeError` for an override of the whole recipe that its last phase, the result, would not see."""
    last = len(phases) - 1
    for key in keys:
        if phases and key in phases[-1]:
            raise RecipeError(
                f"override {key}: the last phase sets {key}={phases[-1][key]} itself: override phases.{last}.{key}"
            )


def joined(values: Mapping[str, Any], phase: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with what a phase changes. Without a quantizer there are no codes to initialise."""
    whole = copy.deepcopy(dict(values))
    for key, value in sorted(phase.items(), key=lambda item: (not item[0].endswith("kind"), item[0].count("."))):
        assign(whole, key, value)
    if phase.get("quantizer.kind") == "identity" and "codebooks.initialise" not in phase:
        assign(whole, "codebooks.initialise", "none")
    return whole


def differences(values: Mapping[str, Any], phase: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`joined` makes ``phase`` of ``values`` with: the sections that differ, each whole."""
    return {key: value for key, value in phase.items() if value != values.get(key)}


def _expanded(phase: Mapping[str, Any]) -> dict[str, Any]:
    spelt = {SHORT.get(key, key) if not isinstance(value, Mapping) else key: value for key, value in phase.items()}
    return flatten(spelt)
