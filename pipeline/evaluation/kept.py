"""What an evaluation keeps of the one before: measures that must be asked for, and were not asked for again.

In: metrics as they lie in metrics.json. Out: the new ones with what still holds of the old, and why the rest does not.
Pure; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_WHAT_MUST_BE_THE_SAME = {
    "step": "the checkpoint of step {}",
    "weights": "the {} weights",
    "data": "the data set {}",
    "content": "data with the fingerprint {}",  # prepared anew in the same folder
    "split": "the {} split",
    "samples": "{} samples",
}


@dataclass(frozen=True)
class Asked:
    """Measures that one option of `tessera evaluate` adds."""

    name: str
    option: str
    keys: tuple[str, ...]
    networks: tuple[str, ...] = ()
    """The files they are measured with, by their names under ``networks``; these are kept and dropped with them."""
    same: tuple[str, ...] = tuple(_WHAT_MUST_BE_THE_SAME)
    """What must not have changed since they were measured."""

    def found_in(self, metrics: dict[str, Any]) -> list[str]:
        """Those of the keys that the metrics hold."""
        return [key for key in self.keys if key in metrics]


ASKED = (
    # of clips from all splits, whichever one the rest is measured on
    Asked("downstream measures", "--downstream", ("downstream",), same=("step", "weights", "data", "content")),
    Asked("rFID", "--inception-weights", ("rfid", "rfid_torchvision"), ("inception",)),
    Asked("LPIPS", "--lpips-weights", ("lpips",), ("vgg16", "alexnet", "lpips_heads")),
)


def keep_measures(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """``now`` and what it does not hold itself of the measures in ``before`` that are of the same weights and data."""
    kept = dict(now)
    networks = dict(now.get("networks", {}))
    for asked in ASKED:
        if asked.found_in(now) or why_outdated(asked, before, now):
            continue
        kept |= {key: before[key] for key in asked.found_in(before)}
        known = before.get("networks", {})
        networks |= {name: known[name] for name in asked.networks if name in known}
    return kept | ({"networks": networks} if networks else {})


def dropped_measures(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each of the measures in ``before`` that are no longer in ``now``: why, and what brings them back."""
    return [
        f"{asked.name} of the evaluation before dropped, measured {why_outdated(asked, before, now)}: {asked.option} "
        "measures again"
        for asked in ASKED
        if asked.found_in(before) and not asked.found_in(now)
    ]


def why_outdated(asked: Asked, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What the measures in ``before`` are of that ``now`` is not; "" where they hold for both."""
    changed = [name for name in asked.same if before.get(name) != now[name]]
    told = {name: _WHAT_MUST_BE_THE_SAME[name] for name in changed}
    return ", ".join(f"on {phrase.format(before.get(name))}, not {now[name]}" for name, phrase in told.items())
