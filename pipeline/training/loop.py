"""The training loop: one optimiser step from top to bottom, in the order in which things happen.

In: a recipe and a run folder, on the ranks that exist. Out: the run folder filled. Starts where the folder left off.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline import collectives
from pipeline.codebooks import CodebookHealth, CodebookSync, initialise_codebooks
from pipeline.data import SamplingPlan, ShardedDataset, build_loader
from pipeline.models import build_collation, build_model
from pipeline.training.checkpoint import CheckpointError, find_latest, load_checkpoint, save_checkpoint
from pipeline.training.engine import build_engine, join_process_group
from pipeline.training.environment import write_environment
from pipeline.training.log import AlarmLog, RunLog, StepMeter, last_attempt
from pipeline.training.optimizer import build_optimizer
from pipeline.training.run_folder import Run
from pipeline.training.schedule import learning_rate_factor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from recipes.schema import Recipe

logger = logging.getLogger("tessera")


class TrainingError(RuntimeError):
    """Training can't go on; the message names the step and what was found."""


def train(recipe: Recipe, run_dir: str | Path) -> Run:
    """Train ``recipe`` into ``run_dir`` on the ranks that exist, from the last whole checkpoint if there is one.

    Every rank calls it. Raises :class:`recipes.schema.RecipeError` for a recipe these ranks or this data can't run,
    :class:`pipeline.training.checkpoint.CheckpointError` for a checkpoint they can't continue, :class:`TrainingError`
    when the loss stops being a number.
    """
    run = Run(run_dir)
    device = join_process_group(recipe.training.collective_timeout)
    recipe.check_ranks(collectives.world_size())
    recipe.check_data()
    _make_repeatable(recipe)
    claim_run_folder(run, recipe)

    dataset = ShardedDataset(recipe.data_folder, recipe.data.split)
    plan = SamplingPlan(dataset, recipe.batch, recipe.data, recipe.seed)
    model = build_model(recipe.model, recipe.quantizer).to(device)
    optimizer = build_optimizer(model, recipe.optimizer)
    sync = CodebookSync(model, optimizer=optimizer, watch_every=recipe.training.log_every)
    accumulation = recipe.batch.micro_batches // collectives.world_size()
    checkpoint = _latest_on_all_ranks(run)
    collation = build_collation(recipe)

    def load(start: int, steps: int | None = None) -> Any:
        return build_loader(
            dataset,
            plan,
            collation,
            rank=collectives.rank(),
            world_size=collectives.world_size(),
            start_step=start,
            steps=steps,
            prefetch=recipe.data.prefetch,
        )

    if checkpoint is None and recipe.codebooks.initialise == "kmeans":
        first_steps = load(0, recipe.codebooks.initialise_steps)
        batches = (batch.to(device) for step in first_steps for batch in step)
        initialise_codebooks(model, batches, method="kmeans")

    engine = build_engine(model, optimizer, recipe.engine, accumulation)
    start = 0
    if checkpoint is not None:
        manifest = load_checkpoint(engine, checkpoint, recipe.engine.zero_stage)
        if manifest.data_fingerprint != plan.fingerprint:
            raise CheckpointError(
                f"{checkpoint} was trained on data {manifest.data_fingerprint}, the recipe now reads "
                f"{plan.fingerprint}: "
                "the data set, its split, the batch or the seed has changed; bring the old ones back or start "
                "a new --run"
            )
        start = manifest.step
    sync.check_ranks_agree()

    log = RunLog(run.log_file, run.path / "tensorboard", attempt=last_attempt(run.log_file) + 1)
    write_environment(run.environment_file)
    meter, alarm_log = StepMeter(), AlarmLog()
    loader = load(start)
    clock = time.perf_counter()
    try:
        for step in range(start, recipe.training.steps):
            micro_batches = next(loader)
            targets = _count_targets(micro_batches, device)
            _set_learning_rate(engine, recipe, step)
            for batch in micro_batches:
                _seed_micro_batch(recipe.seed, step, batch.number)
                output = engine(batch.to(device))
                meter.add(output, batch.targets)
                _backward(engine, output.losses, targets, step, batch.keys)
                engine.step()  # acts at the last micro-batch: all-reduce, clip, optimiser
            health = sync.step()
            done = step + 1
            if done % recipe.codebooks.check_every == 0:
                sync.check_ranks_agree()
            if done % recipe.training.log_every == 0 or done == recipe.training.steps:
                values = meter.read() | health.summary() | _progress(engine, plan, done)
                _check_finite(values, done)
                now = time.perf_counter()
                warnings = _warn(alarm_log, health) if done % recipe.training.log_every == 0 else {}
                log.write(done, values | {"seconds": now - clock, "data_wait": loader.wait_seconds} | warnings)
                clock, loader.wait_seconds = now, 0.0
            if done % recipe.training.checkpoint_every == 0 or done == recipe.training.steps:
                save_checkpoint(
                    engine,
                    run.checkpoints,
                    done,
                    data_fingerprint=plan.fingerprint,
                    codebook_checksum=sync.checksum(),
                    zero_stage=recipe.engine.zero_stage,
                    precision=recipe.engine.precision,
                    keep=recipe.training.keep_checkpoints,
                )
    finally:
        loader.close()
        log.close()
    return run


def claim_run_folder(run: Run, recipe: Recipe) -> None:
    """Write RUN/recipe.yaml. Raises RecipeError when the folder holds a run of another recipe."""
    run.check_recipe(recipe)
    collectives.barrier()
    if collectives.rank() == 0:
        run.path.mkdir(parents=True, exist_ok=True)
        beside = run.recipe_file.with_suffix(".partial")
        beside.write_text(recipe.to_yaml())
        beside.rename(run.recipe_file)
    collectives.barrier()


def _make_repeatable(recipe: Recipe) -> None:
    """The same weights at the start and the same kernels on every rank and every start."""
    torch.manual_seed(recipe.seed)
    if recipe.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _latest_on_all_ranks(run: Run) -> Path | None:
    """The newest whole checkpoint as rank 0 sees it; every rank must see the same folder."""
    name = ""
    if collectives.rank() == 0:
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


def _seed_micro_batch(seed: int, step: int, number: int) -> None:
    """Dropout and sampling noise as a function of (seed, step, micro-batch): the same on any number of ranks, after any
    resume, with nothing to save."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + number & 0x7FFF_FFFF_FFFF_FFFF)


def _count_targets(micro_batches: list[Any], device: torch.device) -> int:
    """Targets of the whole step over all ranks: the one denominator of every loss (design rule 3)."""
    count = torch.tensor([sum(batch.targets for batch in micro_batches)], dtype=torch.int64, device=device)
    return int(collectives.all_reduce_sum(count))


def _set_learning_rate(engine: DeepSpeedEngine, recipe: Recipe, step: int) -> None:
    rate = recipe.optimizer.learning_rate * learning_rate_factor(recipe.schedule, step, recipe.training.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _backward(
    engine: DeepSpeedEngine, losses: dict[str, torch.Tensor], targets: int, step: int, keys: list[str]
) -> None:
    """Backward of the summed losses over the global number of targets.

    DeepSpeed averages gradients over ranks and would divide by the accumulation steps: the factor undoes the first and
    ``scale_wrt_gas`` the second, which leaves sum / targets exactly.
    """
    loss = torch.stack([value.float() for value in losses.values()]).sum()
    if not torch.isfinite(loss):
        parts = ", ".join(f"{name}={float(value)}" for name, value in losses.items())
        raise TrainingError(f"step {step}: the loss is not a number ({parts}) on samples {', '.join(keys)}")
    engine.backward(loss * (collectives.world_size() / targets), scale_wrt_gas=False)


def _progress(engine: DeepSpeedEngine, plan: SamplingPlan, done: int) -> dict[str, float]:
    norm = engine.get_global_grad_norm()
    return {
        "grad_norm": float("nan") if norm is None else float(norm),
        "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        "epoch": plan.epoch(done),
    }


def _warn(alarm_log: AlarmLog, health: CodebookHealth) -> dict[str, list[str]]:
    """Say what is wrong with the codebooks, once; returns it for the log."""
    messages = alarm_log.warnings(health.alarms)
    if collectives.rank() == 0:
        for message in messages:
            logger.warning("%s", message)
    return {"warnings": messages} if messages else {}


def _check_finite(values: dict[str, float], done: int) -> None:
    if values["grad_norm"] in (float("inf"), float("-inf")):
        raise TrainingError(
            f"step {done}: the gradient norm is infinite: lower optimizer.learning_rate or set engine.gradient_clipping"
        )
