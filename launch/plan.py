"""`tessera plan`: what a run would need, without training anything.

In: a recipe, overrides, a number of ranks. Out: a printed table. Builds the model once on the CPU to count it, and
reads the data set's manifest and index if the recipe names one.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from recipes.schema import Recipe


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a rank keeps for the whole run; activations come on top."""

    weights: int
    gradients: int
    optimizer: int
    codebook_state: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.codebook_state


def memory_a_rank(parameters: int, buffer_bytes: int, zero_stage: int, ranks: int) -> MemoryPlan:
    """Persistent bytes a rank under ZeRO (Rajbhandari et al. 2020, section 3): what the stage partitions is divided by
    ``ranks``. 4 bytes each for weight and gradient, 8 for Adam's moments, in either precision: bf16 is autocast's.
    """
    width, moments = 4, 8

    def share(size: int, from_stage: int) -> int:
        return -(-size // ranks) if zero_stage >= from_stage else size

    return MemoryPlan(
        weights=share(parameters * width, 3),
        gradients=share(parameters * width, 2),
        optimizer=share(parameters * moments, 1),
        codebook_state=buffer_bytes,
    )


def print_plan(recipe_name: str, overrides: Sequence[str], ranks: int, console: Console | None = None) -> None:
    """Print the plan; raises RecipeError for a recipe that these ranks can't run or a data set that isn't there."""
    from pipeline.models import build_model
    from recipes.schema import load_recipe

    console = console or Console()
    recipe = load_recipe(recipe_name, overrides)
    recipe.check_ranks(ranks)
    table = Table(
        title=f"{recipe.name} on {ranks} rank{'s' if ranks > 1 else ''}", show_header=False, title_justify="left"
    )
    table.add_column(style="bold")
    table.add_column()
    _add_model(table, recipe, build_model(recipe.model, recipe.quantizer), ranks)
    if not recipe.data.sources:
        table.add_row("data", "not given: add data.path=FOLDER to see samples, steps an epoch and padding")
    else:
        recipe.check_data()
        _add_data(table, recipe, ranks)
    console.print(table)
    command = ["tessera", "train", recipe_name, *overrides, "--run", "RUN", "--ranks", str(ranks)]
    console.print(f"to run it: {shlex.join(command)}", soft_wrap=True)


def _add_model(table: Table, recipe: Recipe, model: nn.Module, ranks: int) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    memory = memory_a_rank(parameters, buffers, recipe.engine.zero_stage, ranks)
    table.add_row("parameters", f"{parameters:,}")
    for name, module in model.named_children():
        count = sum(parameter.numel() for parameter in module.parameters())
        if count:
            table.add_row(f"  {name}", f"{count:,}")
    quantizer = recipe.quantizer
    if quantizer.kind != "identity":
        table.add_row("quantizer", f"{quantizer.kind}, {quantizer.groups} × {quantizer.codes} codes")
    table.add_row(
        "memory a rank",
        f"{_size(memory.total)} + activations (ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision})",
    )
    for name in ("weights", "gradients", "optimizer", "codebook_state"):
        table.add_row(f"  {name.replace('_', ' ')}", _size(getattr(memory, name)))


def _add_data(table: Table, recipe: Recipe, ranks: int) -> None:
    from pipeline.data import SamplingPlan, open_data

    dataset = open_data(recipe.data)
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


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.1f} TiB"
