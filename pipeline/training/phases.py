"""Phases of a run: which are left to train, and what one takes over from the one before.

In: a run folder and its recipe, on every rank. Out: the phases that are not finished, each with where it begins. A
finished phase has the checkpoint of its last step, whole. A phase is a run of its own: its steps, schedule, optimiser,
log and sampling plan begin anew. Its weights are those that the phase before ended with, or their average where that
kept one, and its codes come from k-means over real latents where ``codebooks.initialise`` says so (Zhao et al., arXiv
2411.16550: an encoder trained without a quantizer gives k-means latents that are worth clustering).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline import collectives
from pipeline.quantizers import Quantizer
from pipeline.training.checkpoint import (
    CheckpointError,
    checkpoint_name,
    find_latest,
    read_manifest,
    read_weights,
)
from pipeline.training.checkpoint_writer import discard_unfinished
from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    from recipes.schema import Recipe

logger = logging.getLogger("tessera")


@dataclass(frozen=True)
class Before:
    """The phase before, finished."""

    recipe: Recipe
    checkpoint: Path


@dataclass(frozen=True)
class Phase:
    """What is to be trained into ``folder``."""

    recipe: Recipe
    folder: Run
    checkpoint: Path | None
    """Where it goes on; None at its beginning."""
    before: Before | None
    """What it begins with; None for the first phase, and where it has begun."""


def remaining_phases(run: Run, recipe: Recipe) -> Iterator[Phase]:
    """The unfinished phases in turn; each must be finished when the next is asked for. Of a finished run the last one,
    in which no step is left. Called by every rank."""
    phases = run.phases(recipe)
    place, checkpoint = 0, None
    for later in reversed(range(len(phases))):  # what came before the newest checkpoint is not looked at
        checkpoint = latest_on_all_ranks(phases[later][0])
        if checkpoint is not None:
            place = later
            break
    before = None
    for folder, of_phase in phases[place:]:
        last = folder is run
        end = folder.checkpoints / checkpoint_name(of_phase.training.steps)
        if last or checkpoint is None or read_manifest(checkpoint).step < of_phase.training.steps:
            yield Phase(of_phase, folder, checkpoint, before)
        else:
            end = checkpoint
        before, checkpoint = Before(of_phase, end), None


def latest_on_all_ranks(run: Run) -> Path | None:
    """The newest whole checkpoint as rank 0 sees it; every rank must see the same folder. No start before this one can
    finish another after that."""
    name = ""
    if collectives.rank() == 0:
        discard_unfinished(run.checkpoints)
        found, passed_over = find_latest(run.checkpoints)
        for damage in passed_over:
            logger.warning("checkpoint passed over: %s", damage)
        name = found.name if found else ""
    name = collectives.all_gather_objects(name)[0]
    if not name:
        return None
    checkpoint = run.checkpoints / name
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"rank {collectives.rank()} does not see {checkpoint}: all ranks need the run folder on one file system"
        )
    return checkpoint


@torch.no_grad()
def take_over(model: nn.Module, phase: Phase) -> list[str]:
    """Give ``model`` what the phase before has learned: all but the quantizer, and that too where both phases have the
    same and its codes are not initialised anew. Returns a sentence on what starts anew beside it, or nothing."""
    assert phase.before is not None
    learned = read_weights(phase.before.checkpoint)
    quantizers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Quantizer))
    same = phase.recipe.quantizer == phase.before.recipe.quantizer and phase.recipe.codebooks.initialise == "none"
    anew = []
    for name, tensor in model.state_dict().items():
        if name.startswith(quantizers) and not same:
            continue
        if name in learned and learned[name].shape == tensor.shape:
            tensor.copy_(learned[name])
        else:
            anew.append(name)
    return [f"start anew, as the phase before has none of their shape: {', '.join(anew)}"] if anew else []
