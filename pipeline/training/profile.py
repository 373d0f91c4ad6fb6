"""`--profile`: a trace of a few steps, for chrome://tracing or Perfetto.

In: steps that end. Out: RUN/profile/rank-00000.json, one file a rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline import collectives

logger = logging.getLogger("tessera")

STEPS_BEFORE = 5
"""Steps of a start that are left out: allocators and caches fill in them."""
STEPS = 3


@contextmanager
def step_profiler(folder: Path | None) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step; without a folder it does nothing."""
    if folder is None:
        yield lambda: None
        return
    file = folder / f"rank-{collectives.rank():05d}.json"
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: profile) -> None:
        beside = file.with_suffix(".partial.json")
        profiler.export_chrome_trace(str(beside))
        beside.rename(file)
        if collectives.rank() == 0:
            logger.warning("wrote a trace of steps of each rank to %s: open them in https://ui.perfetto.dev", folder)

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    steps = schedule(wait=STEPS_BEFORE - 1, warmup=1, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:
        yield profiler.step
