"""What in a run's numbers someone should hear of: which collapses last, and what a line of the log says of the loss.

In: the alarms of watched steps and the values of log lines. Out: messages, each with the value, the threshold and what
would do. Pure.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from statistics import median
from typing import Any

from pipeline.codebooks import Alarm

PERSISTENT_STEPS = 5
"""Watched steps in a row that show a collapse before it is warned of: codes and latents of an untrained encoder often
look collapsed and recover within some hundred steps."""
REMINDER_STEPS = 20
"""Watched steps after which a warning is repeated while its cause lasts."""
STUCK_LINES = 50
"""Lines in a row at chance before it is warned of: contrastive training starts there."""
CHANCE = 0.99
"""Part of chance that counts as chance."""
FEWEST_VALID_NEGATIVES = 0.5
"""Share of distractors that differ from their positive: below, most ask nothing."""
SLOW_RANK = 1.5
"""Times of the middle rank that a rank may take for its own work,"""
SLOW_RANK_SECONDS = 1.0
"""and seconds between two lines that it may take more: rank 0 writes the log."""
SPIKE_WINDOW = 32
"""Lines that a loss is compared with."""
FEWEST_LINES = 8
"""Lines that must be there for it."""
SPIKE_SPREADS = 10.0
"""Spreads above the median that are a spike; of normally distributed losses one in 10²² lies so far."""
LEAST_SPREAD = 0.02
"""The spread is taken for at least this part of the median: losses that hardly move have next to none."""
TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class AlarmLog:
    """Decides which of a watched step's alarms are worth a warning: one that has lasted ``persistent`` watched steps,
    and from then on every :data:`REMINDER_STEPS`-th time until it has been gone once."""

    def __init__(self, persistent: int = PERSISTENT_STEPS) -> None:
        self.persistent = persistent
        self._lasting: dict[Hashable, int] = {}  # watched steps in a row, by what is wrong

    def warnings(self, alarms: Mapping[Any, str]) -> list[str]:
        """Messages to be said now; called once for each watched step with all of its alarms, by what is wrong."""
        self._lasting = {key: self._lasting.get(key, 0) + 1 for key in alarms}
        return [
            message
            for key, message in alarms.items()
            if self._lasting[key] >= self.persistent and (self._lasting[key] - self.persistent) % REMINDER_STEPS == 0
        ]


class SpikeAlarm:
    """Tells a loss that jumps from one that moves: against median and spread of the lines before."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._high = False

    def warnings(self, step: int, loss: float) -> list[str]:
        """At most one message, for the first line of a spike; called with each line's loss."""
        if not math.isfinite(loss):  # its step was skipped, which has a warning of its own
            return []
        threshold = self._threshold()
        began = loss > threshold and not self._high
        self._high = loss > threshold
        self._losses.append(loss)
        if not began:
            return []
        return [
            f"the loss jumped to {loss:.4g} at step {step}, above {threshold:.4g}: if it does not come back, lower "
            "optimizer.learning_rate or engine.gradient_clipping and go on from a checkpoint before it"
        ]

    def _threshold(self) -> float:
        if len(self._losses) < FEWEST_LINES:
            return math.inf
        middle = median(self._losses)
        spread = TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle + SPIKE_SPREADS * max(spread, LEAST_SPREAD * abs(middle))


def few_valid_negatives(values: Mapping[str, Any]) -> dict[str, str]:
    """Speech: that most distractors equal their positive, or nothing."""
    share = values.get("valid_negatives", 1.0)
    if not share < FEWEST_VALID_NEGATIVES:
        return {}
    return {
        "valid_negatives": f"{share:.0%} of the negatives differ from their target, fewer than "
        f"{FEWEST_VALID_NEGATIVES:.0%}: most frames share a code; more codes, or codes that are used more evenly "
        "(quantizer.kind=ksom, a higher diversity weight), tell them apart"
    }


def stuck_at_chance(values: Mapping[str, Any], negatives: int) -> dict[str, str]:
    """Speech: that the contrastive loss is what guessing among ``negatives`` distractors gives, or nothing."""
    chance = math.log(1 + negatives * values.get("valid_negatives", 1.0))
    loss = values.get("contrastive", 0.0)
    if not loss >= CHANCE * chance:
        return {}
    return {
        "chance": f"the contrastive loss {loss:.3f} is that of guessing, {chance:.3f} with {negatives} negatives, for "
        f"{STUCK_LINES} log lines or more: try a longer warm-up, a higher or lower optimizer.learning_rate, or shorter "
        "masks (model.masking.length)"
    }


def slow_rank(values: Mapping[str, Any]) -> dict[Hashable, str]:
    """That one rank keeps the others waiting, or nothing."""
    slowest, middle = values.get("slowest_rank_seconds", 0.0), values.get("middle_rank_seconds", 0.0)
    if not slowest > max(SLOW_RANK * middle, middle + SLOW_RANK_SECONDS):
        return {}
    rank = values["slowest_rank"]
    return {
        ("slow_rank", rank): f"rank {rank} took {slowest:.3g} seconds for what takes the middle rank {middle:.3g}, and "
        "all wait for it: look at its machine (RUN/environment.json says which: other processes, heat, its disk if "
        "data_wait_share is high) or leave it out; the result stays the same"
    }


class Alarms:
    """All alarms of one run."""

    def __init__(self, negatives: int = 0) -> None:
        """``negatives``: distractors of a speech model, 0 where there are none."""
        self._negatives = negatives
        self._lasting, self._stuck, self._spike = AlarmLog(), AlarmLog(STUCK_LINES), SpikeAlarm()

    def warnings(self, step: int, values: Mapping[str, Any], collapses: Sequence[Alarm]) -> list[str]:
        """Messages to be said at a line of the log: ``values`` by the log's names, ``collapses`` of the step."""
        found: dict[Hashable, str] = {(alarm.collapse, alarm.quantizer): alarm.message for alarm in collapses}
        messages = self._spike.warnings(step, values.get("loss", math.nan))
        messages += self._lasting.warnings(found | few_valid_negatives(values) | slow_rank(values))
        if self._negatives:
            messages += self._stuck.warnings(stuck_at_chance(values, self._negatives))
        return messages
