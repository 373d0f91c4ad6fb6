"""Learning rate as a pure function of the step: nothing to save, nothing to restore.

In: a ScheduleConfig, the step and the run's length. Out: a factor of the peak learning rate.
"""

from __future__ import annotations

import math

from pipeline.training.config import ScheduleConfig


def learning_rate_factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """Factor of the peak learning rate used by optimiser step ``step`` (counted from 0) of ``steps``.

    Warm-up is linear and ends at factor 1 on step ``warmup_steps``; the decay ends at ``final_factor`` on the last
    step. A ``step`` schedule is lowered from each of its milestones on.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "step":
        return schedule.factor ** sum(step >= milestone for milestone in schedule.milestones)
    decay_start = schedule.warmup_steps + schedule.hold_steps
    if schedule.kind == "constant" or step < decay_start:
        return 1.0
    progress = min(1.0, (step - decay_start) / max(1, steps - 1 - decay_start))
    final = schedule.final_factor
    if schedule.kind == "cosine":
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
    if (
        schedule.kind == "tri_stage"
    ):  # exponential decay, as in SpecAugment and fairseq; 0 can't be reached, .01 stands for it
        return (final or 0.01) ** progress
    return final + (1 - final) * (1 - progress) ** schedule.power
