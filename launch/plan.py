"""`tessera plan`: what a run would need, without training anything.

In: a recipe, overrides, a number of ranks, and the rate of a run like it. Out: a printed table for each phase.
Builds the model on the CPU, runs it without computing it, and reads the data set's manifest and index if the recipe
names one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from pipeline.data import SamplingPlan
    from pipeline.training.memory import ModelSizes, RankMemory
    from recipes.schema import Recipe

PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimiser",
    "average": "weights' average",
    "codebooks": "codebooks",
    "micro_batches": "micro-batches",
    "buckets": "ZeRO's buckets",
    "activations": "activations",
    "step": "or optimiser step",
}


def print_plan(
    recipe_name: str,
    overrides: Sequence[str],
    ranks: int,
    rate: float | None = None,
    device: Literal["cpu", "gpu"] = "gpu",
    console: Console | None = None,
) -> None:
    """Print the plan; ``rate`` is in seconds of speech, or images, a second over all ranks.

    Raises RecipeError for a recipe that these ranks can't run or a data set that isn't there.
    """
    from recipes.schema import load_recipe

    console = console or Console()
    recipe = load_recipe(recipe_name, overrides)
    recipe.check_ranks(ranks)
    if recipe.data.sources:
        recipe.check_data()
    for number, phase in enumerate(recipe.in_turn, start=1):
        of_all = f", phase {number} of {len(recipe.phases)}," if recipe.phases else ""
        title = f"{recipe.name}{of_all} on {ranks} rank{'s' if ranks > 1 else ''}"
        _print_phase(phase, title, ranks, rate, device, console)
    command = ["tessera", "train", recipe_name, *overrides, "--run", "RUN", "--ranks", str(ranks)]
    console.print(f"to run it: {shlex.join(command)}", soft_wrap=True)


def _print_phase(
    recipe: Recipe, title: str, ranks: int, rate: float | None, device: Literal["cpu", "gpu"], console: Console
) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    dataset = None
    if recipe.data.sources:
        from pipeline.data import open_data

        dataset = open_data(recipe.data)
    hint = _add_model(table, recipe, dataset, ranks, device)
    work = _work_without_data(recipe)
    if dataset is None:
        table.add_row("data", "not given: add data.path=FOLDER to see samples, steps an epoch and padding")
        table.add_row("the run", f"{recipe.training.steps:,} steps")
    else:
        work = _add_data(table, recipe, dataset, ranks)
    _add_time(table, recipe, work, rate, bound=dataset is None)
    console.print(table)
    if hint:
        console.print(hint, soft_wrap=True)


def plan_memory(
    recipe: Recipe, ranks: int, device: Literal["cpu", "gpu"], bins: int | None = None
) -> tuple[ModelSizes, dict[int, RankMemory], tuple[int, int], dict[str, int]]:
    """The model's sizes; a rank's memory by ZeRO stage, for the micro-batch that needs the most; that micro-batch as
    (samples, length of each); and the parameters of each part of the model.

    ``bins`` of the data's table of lengths, if there is data: see ``micro_batch_shapes``.
    """
    from pipeline.data.config import MAX_BINS
    from pipeline.models import build_model
    from pipeline.training.activations import measure_activations, micro_batch_shapes
    from pipeline.training.memory import model_sizes, rank_memory

    found, sizes, parts = {}, None, {}
    for shape in micro_batch_shapes(recipe, bins or MAX_BINS):
        model = build_model(recipe.model, recipe.quantizer)
        sizes = model_sizes(model)
        counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()}
        parts = {name: count for name, count in counts.items() if count}
        found[shape] = measure_activations(recipe, model, shape, device)
    assert sizes is not None
    fullest = max(found, key=lambda shape: found[shape].peak)
    memory = {
        stage: rank_memory(
            sizes,
            found[fullest],
            recipe.engine.model_copy(update={"zero_stage": stage}),
            device,
            ranks=ranks,
            accumulation=recipe.batch.micro_batches // ranks,
            ahead=recipe.data.prefetch,
            moments=recipe.optimizer.moments,
            averaged=bool(recipe.training.weight_ema),
        )
        for stage in range(4)
    }
    return sizes, memory, fullest, parts


def _add_model(table: Table, recipe: Recipe, dataset: Any, ranks: int, device: Literal["cpu", "gpu"]) -> str:
    """Rows about the model; returns a hint at what would make its memory smaller, or nothing."""
    bins = None if dataset is None or recipe.data_kind == "image" else _bins(dataset)
    sizes, by_stage, shape, parts = plan_memory(recipe, ranks, device, bins)
    memory = by_stage[recipe.engine.zero_stage]
    table.add_row("parameters", f"{sizes.parameters:,}")
    for name, count in parts.items():
        table.add_row(f"  {name}", f"{count:,}")
    quantizer = recipe.quantizer
    if quantizer.kind != "identity":
        levels = getattr(recipe.model, "levels", ())
        each = f" at each level: {', '.join(levels)}" if levels else ""
        table.add_row("quantizer", f"{quantizer.kind}, {quantizer.groups} × {quantizer.codes} codes{each}")
    again = ", activations computed twice" if recipe.engine.activation_checkpointing else ""
    table.add_row(
        "memory a rank",
        f"{_size(memory.total)} at most ({device.upper()}, ZeRO {recipe.engine.zero_stage}, "
        f"{recipe.engine.precision}{again})",
    )
    for part, name in PARTS.items():
        size = getattr(memory, part)
        if size:
            table.add_row(f"  {name}", _size(size) + (f", of {_shape(recipe, shape)}" if part == "activations" else ""))
    table.add_row(
        "a checkpoint", f"{_size(sizes.checkpoint(recipe.optimizer.moments, bool(recipe.training.weight_ema)))} on disk"
    )
    return _hint(recipe, by_stage, ranks)


def _hint(recipe: Recipe, by_stage: dict[int, RankMemory], ranks: int) -> str:
    memory = by_stage[recipe.engine.zero_stage]
    ways = []
    if memory.activations > memory.total / 2:
        smaller = "seconds" if recipe.data_kind == "speech" else "samples"
        ways += [] if recipe.engine.activation_checkpointing else ["engine.activation_checkpointing=true"]
        ways += [] if recipe.engine.precision != "fp32" else ["engine.precision=bf16"]
        ways.append(f"a smaller batch.{smaller} with more batch.micro_batches")
    least = min(by_stage, key=lambda stage: by_stage[stage].total)
    if by_stage[least].total < 0.9 * memory.total:
        ways.append(f"engine.zero_stage={least} ({_size(by_stage[least].total)})")
    elif ranks == 1 and memory.activations < memory.total / 2:
        ways.append("more ranks, which share the optimiser's state by engine.zero_stage=1, and gradients too by 2")
    return f"less memory: {', or '.join(ways)}" if ways else ""


def _shape(recipe: Recipe, shape: tuple[int, int]) -> str:
    samples, length = shape
    if recipe.data_kind == "image":
        return f"{samples} images of {length} × {length}"
    from pipeline.data.config import SAMPLE_RATE

    return f"{samples} clip{'s' if samples > 1 else ''} of {length / SAMPLE_RATE:.1f} s"


def _bins(dataset: Any) -> int:
    return max(source.length_table.shape[1] for source in dataset.sources)


def _add_data(table: Table, recipe: Recipe, dataset: Any, ranks: int) -> float:
    """Rows about the data; returns the run's seconds of speech, or images."""
    from pipeline.data import SamplingPlan

    plan = SamplingPlan(dataset, recipe.batch, recipe.data, recipe.seed)
    epochs = plan.epochs(recipe.training.steps)
    for place, (source, stream) in enumerate(zip(dataset.sources, plan.streams, strict=True)):
        table.add_row("data", f"{source.path}, split {source.split}")
        if source.kind == "speech":
            seconds = source.manifest.splits[source.split].seconds
            short = f"; {stream.skipped} too short for the plan" if stream.skipped else ""
            table.add_row("  clips", f"{len(source):,}, {seconds / 3600:.2f} h{short}")
            table.add_row("  padding", f"{stream.padding_share:.1%} of the padded seconds")
        else:
            table.add_row("  images", f"{len(source):,}")
        if len(epochs) > 1:
            table.add_row("  its part", f"{plan.shares[place]:.1%} of the micro-batches, {epochs[place]:.2f} epochs")
    a_rank = recipe.batch.micro_batches // ranks
    table.add_row("a step", f"{recipe.batch.micro_batches} micro-batches, {a_rank} a rank")
    table.add_row("an epoch", f"{plan.micro_batches_per_epoch:,.1f} micro-batches, {plan.steps_per_epoch:.1f} steps")
    table.add_row("the run", f"{recipe.training.steps:,} steps, {plan.epoch(recipe.training.steps):.2f} epochs")
    return _work(recipe, dataset, plan)


def _work(recipe: Recipe, dataset: Any, plan: SamplingPlan) -> float:
    """Seconds of speech, without padding, or images in the whole run."""
    if recipe.batch.seconds is None:
        return _work_without_data(recipe)
    from pipeline.data.buckets import Buckets
    from pipeline.data.config import LENGTH_BIN, SAMPLE_RATE

    total = 0.0
    for source, stream, epochs in zip(dataset.sources, plan.streams, plan.epochs(recipe.training.steps), strict=True):
        buckets = Buckets(recipe.data, recipe.batch.seconds, source.length_table.shape[1])
        seconds = buckets.least_seconds(source.length_table.sum(axis=0, dtype="int64"))
        total += epochs * (seconds + stream.samples * LENGTH_BIN / SAMPLE_RATE / 2)  # on average half a bin more
    return total


def _work_without_data(recipe: Recipe) -> float:
    """Images in the whole run; of speech at most so many seconds."""
    each = recipe.batch.samples if recipe.batch.seconds is None else recipe.batch.seconds
    return float(recipe.training.steps * recipe.batch.micro_batches * (each or 0))


def _add_time(table: Table, recipe: Recipe, work: float, rate: float | None, *, bound: bool) -> None:
    speech = recipe.data_kind == "speech"
    most = "at most " if bound and speech else ""
    table.add_row("  it sees", f"{most}{work / 3600:,.1f} h of speech" if speech else f"{work:,.0f} images")
    if rate is None:
        name = "audio_per_second" if speech else "samples_per_second"
        table.add_row("  time", f"add --rate={name.upper()}, which the log of a short run on these ranks has")
        return
    unit = "s of speech" if speech else "images"
    table.add_row(
        "  time", f"{most}{_duration(work / rate)} at {rate:,g} {unit} a second; checkpoints and start come on top"
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"
