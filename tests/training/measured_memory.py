"""Most bytes of tensors that each rank of a real training holds at one time, as torch's own CPU allocator counts them.

``python -m tests.training.measured_memory FOLDER CASES``: CASES is a JSON list of (ranks, recipe, overrides). Each
makes a line of JSON on standard output, the ranks' peaks. Every rank is a process of its own, forked from this one, so
that libraries load once for all of them.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from pipeline.training.engine import _free_port, import_deepspeed
from pipeline.training.loop import train
from recipes.schema import load_recipe


def main(folder: Path, cases: list[tuple[int, str, list[str]]]) -> None:
    # Without it the allocator counts only in threads that the profiler runs in, and gloo's free what others made.
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    ctypes.c_bool.in_dll(library, "FLAGS_caffe2_report_cpu_memory_usage").value = True
    import_deepspeed()
    import pipeline.models.speech  # noqa: F401

    for number, (ranks, recipe, overrides) in enumerate(cases):
        peaks = peaks_of(ranks, recipe, overrides, folder / f"case-{number}")
        print(json.dumps({"peaks": peaks}), flush=True)


def peaks_of(ranks: int, recipe: str, overrides: list[str], run: Path) -> list[int]:
    os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    run.mkdir(parents=True)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            code = 1
            try:
                (run / f"peak-{rank}").write_text(str(peak_of_rank(recipe, overrides, run)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise RuntimeError(f"ranks of {recipe} {overrides} ended with {codes}")
    return [int((run / f"peak-{rank}").read_text()) for rank in range(ranks)]


def peak_of_rank(recipe: str, overrides: list[str], run: Path) -> int:
    loaded = load_recipe(recipe, overrides)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        train(loaded, run)
    assert profiler.profiler is not None
    events = flat(profiler.profiler.kineto_results.experimental_event_tree())
    return max(event.extra_fields.total_allocated for event in events if event.tag == _EventType.Allocation)


def flat(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from flat(event.children)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
