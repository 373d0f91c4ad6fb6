"""What training costs beside the model itself: the loop, checkpoints, starting and resuming.

`python -m tests.benchmarks.training` needs no data of its own: it prepares the repository's sample. On two gloo ranks
with one thread each it prints

- a step of the trainer beside a step of a bare DistributedDataParallel loop and of a bare DeepSpeed loop with the same
  model, optimiser, batches and codebook update, run by turns, in CPU time of a rank (what other load on the machine
  does not change much) and in wall time;
- how long training waits for a checkpoint, of the same model and of one with 100 M parameters, and how long the file
  takes to be whole;
- saving and loading that model beside DeepSpeed's own checkpoints, plain and universal;
- the phases of a start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.harness import run_ranks

RECIPES = {"image": "image/autoencoder_tiny_ksom", "speech": "speech/wav2vec2_tiny"}
STAGES = (0, 1, 2)
STEPS_A_LINE = 10
LINES = 4  # of a turn; the first is not counted
WIDTH, DEPTH = 2048, 24  # 100.7 M parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=4, help="of each loop")
    parser.add_argument("--only", choices=["loop", "checkpoint", "start"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = {kind: Path(folder) / kind for kind in RECIPES}
        for kind, out in data.items():
            _prepare(kind, out)
        if options.only in (None, "loop"):
            _print_loops(data, Path(folder), options.turns)
        if options.only in (None, "checkpoint"):
            _print_checkpoints(Path(folder))
        if options.only in (None, "start"):
            _print_start(data["image"], Path(folder))


def _prepare(kind: str, out: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "prepare", "images" if kind == "image" else kind]
    source = f"tests/data/{'images' if kind == 'image' else kind}"
    subprocess.run([*command, source, str(out)], check=True, capture_output=True)


# -- a step ------------------------------------------------------------------------------------------------------------


def _print_loops(data: dict[str, Path], folder: Path, turns: int) -> None:
    print("## A step, two ranks with one thread each\n")
    print("| model | loop | CPU ms a step and rank, best | × DDP | median | × | wall ms, best | × | median | × |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    stalls = {}
    for kind, recipe in RECIPES.items():
        lines, stalls[kind] = run_ranks(_both_loops, 2, recipe, str(data[kind]), str(folder), turns, timeout=1800)[0]
        bare = [list(column) for column in zip(*lines["DDP"], strict=True)]
        for loop, of_loop in lines.items():
            columns = [list(column) for column in zip(*of_loop, strict=True)]
            cells = [
                f"{1000 * f(column):.1f} | {f(column) / f(of_bare):.2f}"
                for column, of_bare in zip(columns, bare, strict=True)
                for f in (min, statistics.median)
            ]
            print(f"| {kind} | {loop} | {' | '.join(cells)} |", flush=True)
    print("\nWhat a checkpoint holds up training for, of these models:\n")
    print("| model | ms, best | median | share of a median step's wall time |\n|---|---|---|---|")
    for kind, (stall, step) in stalls.items():
        share = statistics.median(stall) / step
        print(f"| {kind} | {_best_and_median(stall)} | {share:.1%} |")


def _best_and_median(seconds: Any) -> str:
    return f"{1000 * min(seconds):.1f} | {1000 * statistics.median(seconds):.1f}"


def _both_loops(recipe_name: str, data: str, folder: str, turns: int) -> Any:
    """(CPU, wall) seconds of a step by loop, a value a log line, of rank 0; and what checkpoints held it up for."""
    from pipeline.training import loop as trainer
    from recipes.schema import load_recipe

    steps = STEPS_A_LINE * LINES
    overrides = [f"data.path={data}", f"training.steps={steps}", f"training.log_every={STEPS_A_LINE}"]
    never = f"training.checkpoint_every={steps}"
    recipe = load_recipe(recipe_name, [*overrides, never])
    saving = load_recipe(
        recipe_name, [*overrides, "engine.zero_stage=1", f"training.checkpoint_every={STEPS_A_LINE // 2}"]
    )
    clocks: list[tuple[float, float]] = []
    stalls: list[float] = []

    class ClockedLog(trainer.RunLog):
        def write(self, step: int, values: Any) -> None:
            super().write(step, values)
            clocks.append((time.process_time(), time.perf_counter()))

    class ClockedWriter(trainer.CheckpointWriter):
        def save(self, *arguments: Any) -> None:
            began = time.perf_counter()
            super().save(*arguments)
            stalls.append(time.perf_counter() - began)

    trainer.RunLog, trainer.CheckpointWriter = ClockedLog, ClockedWriter  # type: ignore[misc]
    loops = ["DDP", *(f"{loop}, ZeRO {stage}" for stage in STAGES for loop in ("DeepSpeed", "trainer"))]
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for turn in range(turns):
        for name in lines:
            clocks.clear()
            stage = name[-1] if name != "DDP" else "0"
            of_stage = load_recipe(recipe_name, [*overrides, f"engine.zero_stage={stage}", never])
            if name == "DDP":
                _bare_loop(of_stage, clocks)
            elif name.startswith("DeepSpeed"):
                _bare_engine_loop(of_stage, clocks)
            else:
                trainer.train(of_stage, Path(folder) / f"{recipe.name}-{stage}-{turn}")
            for before, after in list(itertools.pairwise(clocks))[1:]:
                seconds = tuple((b - a) / STEPS_A_LINE for a, b in zip(before, after, strict=True))
                lines[name].append(seconds)  # type: ignore[arg-type]
    stalls.clear()
    trainer.train(saving, Path(folder) / f"{recipe.name}-saving")
    return lines, (stalls, statistics.median(wall for _, wall in lines["trainer, ZeRO 1"]))


def _bare_loop(recipe: Any, clocks: list[tuple[float, float]]) -> None:
    """The least that trains the same: DDP, gradients summed once a step, clipping, torch's optimiser."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from pipeline.codebooks import CodebookSync
    from pipeline.models import build_model
    from pipeline.training.optimizer import build_optimizer

    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, recipe.quantizer)
    sync = CodebookSync(model)
    parallel = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = build_optimizer(model, recipe.optimizer)

    def step(micro_batches: list[Any], factor: float) -> None:
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else parallel.no_sync():
                output = parallel(batch)
                loss = torch.stack([value.float() for value in output.losses.values()]).sum()
                (loss * factor).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.engine.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        sync.step()

    _run_bare(recipe, step, clocks)


def _bare_engine_loop(recipe: Any, clocks: list[tuple[float, float]]) -> None:
    """The same with the recipe's DeepSpeed engine in the place of DDP and the optimiser."""
    import torch

    from pipeline import collectives
    from pipeline.codebooks import CodebookSync
    from pipeline.models import build_model
    from pipeline.training.engine import build_engine
    from pipeline.training.optimizer import build_optimizer

    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, recipe.quantizer)
    optimizer = build_optimizer(model, recipe.optimizer)
    sync = CodebookSync(model, optimizer=optimizer)
    accumulation = recipe.batch.micro_batches // collectives.world_size()
    engine, _ = build_engine(model, optimizer, recipe.engine, accumulation)

    def step(micro_batches: list[Any], factor: float) -> None:
        for batch in micro_batches:
            output = engine(batch)
            loss = torch.stack([value.float() for value in output.losses.values()]).sum()
            engine.backward(loss * factor, scale_wrt_gas=False)
            engine.step()
        sync.step()

    _run_bare(recipe, step, clocks)


def _run_bare(recipe: Any, step: Callable[[list[Any], float], None], clocks: list[tuple[float, float]]) -> None:
    """Call ``step`` with each step's micro-batches and what their losses are multiplied by."""
    import torch

    from pipeline import collectives
    from pipeline.data import SamplingPlan, build_loader, open_data
    from pipeline.models import build_collation

    dataset = open_data(recipe.data)
    plan = SamplingPlan(dataset, recipe.batch, recipe.data, recipe.seed)
    rank, world_size = collectives.rank(), collectives.world_size()
    with build_loader(dataset, plan, build_collation(recipe), rank=rank, world_size=world_size) as loader:
        for number in range(recipe.training.steps):
            micro_batches = next(loader)
            targets = collectives.all_reduce_sum(torch.tensor([sum(batch.targets for batch in micro_batches)]))
            step(micro_batches, world_size / int(targets))
            if (number + 1) % STEPS_A_LINE == 0:
                clocks.append((time.process_time(), time.perf_counter()))


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _print_checkpoints(folder: Path) -> None:
    print("\n## Checkpoints of 100 M parameters with Adam's moments (1.2 GB), two ranks, ZeRO 1\n")
    seconds = run_ranks(_large_checkpoints, 2, str(folder), timeout=1800)[0]
    print("| what | s |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} |")


def _large_checkpoints(folder: str) -> dict[str, float]:
    import torch
    from torch import distributed, nn

    from pipeline import collectives
    from pipeline.training.checkpoint import checkpoint_name, find_damage, load_checkpoint
    from pipeline.training.checkpoint_writer import CheckpointWriter, Retention
    from pipeline.training.config import EngineConfig, OptimizerConfig
    from pipeline.training.engine import build_engine
    from pipeline.training.optimizer import build_optimizer

    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
    engine, _ = build_engine(model, build_optimizer(model, OptimizerConfig()), EngineConfig(), 1)
    inputs = torch.randn(4, WIDTH)
    seconds = {}

    def step() -> None:
        engine.backward(engine(inputs).square().mean())
        engine.step()

    def clock(name: str, action: Any) -> None:
        distributed.barrier()
        began = time.perf_counter()
        action()
        distributed.barrier()
        seconds[name] = time.perf_counter() - began

    step()
    clock("a step of this model, 4 tokens", step)
    writer = CheckpointWriter(Path(folder) / "ours", Retention(1))
    facts = {"zero_stage": 1, "precision": "fp32", "loss": None, "data_fingerprint": "", "codebook_checksum": ""}
    clock("ours: training waits", lambda: writer.save(engine, 1, facts))
    clock("ours: written, hashed, fsynced and renamed after that", writer.commit)
    checkpoint = Path(folder) / "ours" / checkpoint_name(1)
    clock("ours: found whole (every sha256)", lambda: find_damage(checkpoint))
    clock("ours: loaded", lambda: load_checkpoint(engine, checkpoint))
    theirs = str(Path(folder) / "deepspeed")
    clock("DeepSpeed: saved, training waits", lambda: engine.save_checkpoint(theirs, tag="step"))
    clock("DeepSpeed: loaded on the same ranks", lambda: engine.load_checkpoint(theirs, tag="step"))
    clock("DeepSpeed: made universal, for other ranks", lambda: _make_universal(theirs, collectives.rank()))
    return seconds


def _make_universal(folder: str, rank: int) -> None:
    if rank:
        return
    from deepspeed.checkpoint import ds_to_universal

    arguments = argparse.Namespace(
        input_folder=f"{folder}/step",
        output_folder=f"{folder}/universal",
        num_extract_workers=2,
        num_merge_workers=2,
        keep_temp_folder=False,
        strict=False,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)


# -- start -------------------------------------------------------------------------------------------------------------

_PHASES = """
import json, sys, time
seconds, clock = {}, time.perf_counter()
def phase(name):
    global clock
    now = time.perf_counter()
    seconds[name] = now - clock
    clock = now
import torch; phase("import torch")
from pipeline.training.engine import import_deepspeed, build_engine, join_process_group
import_deepspeed(); phase("import DeepSpeed")
from pipeline.training import loop
from recipes.schema import load_recipe
from pipeline.models import build_model, build_collation
from pipeline.data import SamplingPlan, build_loader, open_data
recipe = load_recipe(sys.argv[1], [f"data.path={sys.argv[2]}"]); phase("import the trainer, read the recipe")
join_process_group(60); phase("process group")
dataset = open_data(recipe.data); plan = SamplingPlan(dataset, recipe.batch, recipe.data, 0)
loader = build_loader(dataset, plan, build_collation(recipe)); phase("data set and plan")
model = build_model(recipe.model, recipe.quantizer)
optimizer = loop.build_optimizer(model, recipe.optimizer)
sync = loop.CodebookSync(model, optimizer=optimizer); phase("model and codebooks")
engine, _ = build_engine(model, optimizer, recipe.engine, recipe.batch.micro_batches); phase("DeepSpeed engine")
batches = next(loader); phase("first batches")
for batch in batches:
    output = engine(batch)
    engine.backward(sum(output.losses.values()) / batch.targets)
    engine.step()
sync.step(); phase("first step")
loader.close()
print(json.dumps(seconds))
"""


def _print_start(data: Path, folder: Path) -> None:
    import json

    recipe, turns = RECIPES["image"], 3
    print("\n## Starting and resuming, one rank, the image model\n")
    found: dict[str, list[float]] = {}
    for _ in range(turns):
        command = [sys.executable, "-c", _PHASES, recipe, str(data)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name, seconds in json.loads(output.splitlines()[-1]).items():
            found.setdefault(name, []).append(seconds)
    print("| phase | s, best | median |\n|---|---|---|")
    for name, values in found.items():
        print(f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} |")
    run = folder / "resumed"
    command = [sys.executable, "-m", "launch.cli", "train", recipe, f"data.path={data}", "--run", str(run)]
    totals: dict[str, list[float]] = {"`tessera train` of 1 step": [], "the same, resumed, for 1 step": []}
    for _ in range(turns):
        shutil.rmtree(run, ignore_errors=True)
        for steps, name in enumerate(totals, start=1):
            began = time.perf_counter()
            subprocess.run(
                [*command, f"training.steps={steps}", "schedule.warmup_steps=0"], check=True, capture_output=True
            )
            totals[name].append(time.perf_counter() - began)
    for name, values in totals.items():
        print(f"| {name} | {min(values):.2f} | {statistics.median(values):.2f} |")


if __name__ == "__main__":
    main()
