"""The training loop: one optimiser step from top to bottom, in the order in which things happen.

In: a recipe and a run folder, on the ranks that exist. Out: the run folder filled, phase after phase. Starts where the
folder left off.
"""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline import collectives
from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.data import SamplingPlan, build_loader, open_data
from pipeline.data.storage import write_whole
from pipeline.models import build_collation, build_model
from pipeline.models.batch_norm import NormSync
from pipeline.models.initialise import initialise
from pipeline.training.alarms import Alarms
from pipeline.training.average import WeightAverage
from pipeline.training.checkpoint import CheckpointError, load_checkpoint, read_manifest
from pipeline.training.checkpoint_writer import CheckpointWriter, Retention
from pipeline.training.engine import build_engine, join_process_group
from pipeline.training.environment import write_environment
from pipeline.training.guard import SkipGuard
from pipeline.training.log import RunLog, StepMeter, check_wandb
from pipeline.training.loss_scale import LossScale
from pipeline.training.optimizer import build_optimizer
from pipeline.training.peer_loss import explained
from pipeline.training.phases import Phase, remaining_phases, take_over
from pipeline.training.profile import step_profiler
from pipeline.training.run_folder import Run
from pipeline.training.run_lock import PATIENCE, RunLock
from pipeline.training.schedule import learning_rate_factor
from pipeline.training.stop import Interrupted, StopRequest
from pipeline.training.throughput import CollectiveClock, Throughput

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from recipes.schema import Recipe

logger = logging.getLogger("tessera")


@explained
def train(recipe: Recipe, run_dir: str | Path, *, profile: bool = False) -> Run:
    """Train ``recipe`` into ``run_dir`` on the ranks that exist, from the last whole checkpoint if there is one.

    Every rank calls it. With ``profile`` it also writes a trace of a few steps into ``run_dir/profile``.

    Raises :class:`recipes.schema.RecipeError` for a recipe these ranks or this data can't run,
    :class:`pipeline.training.checkpoint.CheckpointError` for a checkpoint they can't continue or can't write,
    :class:`pipeline.training.guard.TrainingError` when step after step has no finite gradient,
    :class:`pipeline.training.run_lock.RunInUse` when another training holds the folder,
    :class:`pipeline.training.peer_loss.PeerLost` when another rank is gone, and
    :class:`pipeline.training.stop.Interrupted` when a signal asked to stop and the state is saved.
    """
    run = Run(run_dir)
    device = join_process_group(recipe.training.collective_timeout)
    recipe.check_ranks(collectives.world_size())
    recipe.check_data()
    check_wandb(recipe.training.wandb)
    # Ranks of a start before that can't reach theirs hold it for so long.
    lock = RunLock(run.path, PATIENCE + recipe.training.collective_timeout)
    try:
        claim_run_folder(run, recipe)
        for phase in remaining_phases(run, recipe):
            if phase.folder is not run:
                claim_run_folder(phase.folder, phase.recipe)
            _train_phase(phase, run, device, lock, profile)
            gc.collect()  # engines refer to themselves, and the next phase wants their memory
    finally:
        lock.close()
    return run


def _train_phase(phase: Phase, run: Run, device: torch.device, lock: RunLock, profile: bool) -> None:
    """Train a phase of ``run`` to its end. What it takes of memory goes with it."""
    recipe, folder, checkpoint = phase.recipe, phase.folder, phase.checkpoint
    _make_repeatable(recipe)
    dataset = open_data(recipe.data)
    plan = SamplingPlan(dataset, recipe.batch, recipe.data, recipe.seed)
    model = build_model(recipe.model, recipe.quantizer).to(device)
    optimizer = build_optimizer(model, recipe.optimizer)
    sync = CodebookSync(model, optimizer=optimizer, watch_every=recipe.training.log_every)
    norms = NormSync(model)
    accumulation = recipe.batch.micro_batches // collectives.world_size()
    if checkpoint is not None:
        _check_data_state(checkpoint, plan)
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

    if checkpoint is None:
        _warn(initialise(model, recipe) if phase.before is None else take_over(model, phase))
    if checkpoint is None and recipe.codebooks.initialise == "kmeans":
        first_steps = load(0, recipe.codebooks.initialise_steps)
        batches = (batch.to(device) for step in first_steps for batch in step)
        initialise_codebooks(model, batches, method="kmeans")

    for quantizer in sync.quantizers.values():
        quantizer.spoils_infinite = True  # the guard and the engine skip such a step on all ranks

    engine, loss_scale = build_engine(model, optimizer, recipe.engine, accumulation)
    average = WeightAverage(engine, recipe.training.weight_ema) if recipe.training.weight_ema else None
    start = 0
    if checkpoint is not None:
        manifest = load_checkpoint(engine, checkpoint, average)
        start = manifest.step
        loss_scale.load(manifest.loss_scale)
    sync.check_ranks_agree()

    log = RunLog(folder, recipe)
    write_environment(run.environment_file)
    meter, throughput = StepMeter(), Throughput(device, recipe.engine.precision)
    alarms, guard = Alarms(_negatives(recipe)), SkipGuard(recipe.training.max_skipped)
    retention = Retention(recipe.training.keep_checkpoints, recipe.training.keep_every, recipe.training.keep_best)
    writer = CheckpointWriter(folder.checkpoints, retention, [folder.recipe_file, run.environment_file], lock, average)
    retry_at, loss = 0, None
    loader = load(start)

    def facts() -> dict[str, Any]:
        return {
            "zero_stage": recipe.engine.zero_stage,
            "precision": recipe.engine.precision,
            "loss": loss,
            "data_fingerprint": plan.fingerprint,
            "data": plan.description,
            "codebook_checksum": sync.checksum(),
            "loss_scale": loss_scale.state(),
        }

    try:
        with (
            StopRequest(run.path if collectives.rank() == 0 else None) as stop,
            CollectiveClock(device) as exchange,
            step_profiler(folder.path / "profile" if profile else None) as end_of_step,
        ):
            sum_over_ranks = exchange.timed(_sum_over_ranks)  # where the others wait for a rank that comes late
            for step in range(start, recipe.training.steps):
                micro_batches = next(loader)
                targets, stopping, writing = sum_over_ranks(
                    [sum(batch.targets for batch in micro_batches), bool(stop.reason), writer.busy], device
                )
                if writer.pending and not writing and not writer.commit():
                    retry_at = step + max(1, recipe.training.checkpoint_every // 10)
                if stopping:
                    if step > start or checkpoint is None:
                        writer.save_and_wait(engine, step, facts())
                    raise Interrupted(f"stopped by {stop.reason or 'another rank'} after step {step}")
                _set_learning_rate(engine, recipe, step)
                for batch in micro_batches:
                    _seed_micro_batch(recipe.seed, step, batch.number, device)
                    with throughput.counting_flops(batch):
                        output = engine(batch.to(device))
                    meter.add(output, batch.targets)
                    guard.watch(output.losses, batch.keys)
                    throughput.add(batch, output)
                    _backward(engine, loss_scale, output.losses, targets)
                    engine.step()  # acts at the last micro-batch: all-reduce, clip, optimiser
                applied = engine.was_step_applied()  # the same on every rank: ZeRO looks at the joint gradient
                guard.note(step, applied, micro_batches, loss_scale.update(applied))
                health = sync.step() if applied else sync.discard()
                norms.step() if applied else norms.discard()
                if applied and average is not None:
                    average.update(step)
                done = step + 1
                if done % recipe.codebooks.check_every == 0:
                    sync.check_ranks_agree()
                if done % recipe.training.log_every == 0 or done == recipe.training.steps:
                    values = meter.read() | health.summary() | _progress(engine, loss_scale, plan, done)
                    loss = values.get("loss")
                    values |= {"skipped": guard.read()} | throughput.read(loader.wait_seconds, exchange.read())
                    loader.wait_seconds = 0.0
                    watched = done % recipe.training.log_every == 0
                    warnings = _warn(alarms.warnings(done, values, health.alarms)) if watched else {}
                    lock.check()
                    log.write(done, values | warnings)
                end_of_step()
                if done == recipe.training.steps:
                    writer.save_and_wait(engine, done, facts())
                elif done % recipe.training.checkpoint_every == 0 or done == retry_at:
                    writer.save(engine, done, facts())
    finally:
        loader.close()
        log.close()
        writer.close()
    engine.destroy()


def claim_run_folder(run: Run, recipe: Recipe) -> None:
    """Write RUN/recipe.yaml. Raises RecipeError when the folder holds a run of another recipe."""
    run.check_recipe(recipe)
    collectives.barrier()
    if collectives.rank() == 0:
        run.path.mkdir(parents=True, exist_ok=True)
        write_whole(run.recipe_file, recipe.to_yaml().encode())
    collectives.barrier()


def _make_repeatable(recipe: Recipe) -> None:
    """The same weights at the start and the same kernels on every rank and every start."""
    torch.manual_seed(recipe.seed)
    if recipe.engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def _check_data_state(checkpoint: Path, plan: SamplingPlan) -> None:
    """Refuse to go on where the next steps would not be those that an uninterrupted run would take."""
    manifest = read_manifest(checkpoint)
    if manifest.data_fingerprint != plan.fingerprint:
        changes = "\n".join(f"  {line}" for line in plan.changes_since(manifest.data))
        raise CheckpointError(
            f"{checkpoint} was trained on other data than the recipe reads now:\n{changes}\n"
            "bring the old data back, or start a new --run"
        )


def _seed_micro_batch(seed: int, step: int, number: int, device: torch.device) -> None:
    """Dropout and sampling noise as a function of (seed, step, micro-batch): the same on any number of ranks, after any
    resume, with nothing to save."""
    value = (seed * 1_000_003 + step) * 65_537 + number & 0x7FFF_FFFF_FFFF_FFFF
    # torch.manual_seed would do both, and format a stack trace each time for a CUDA that is not there.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def _sum_over_ranks(values: list[int], device: torch.device) -> list[int]:
    """A step's only exchange beside gradients and codebooks. The targets of the whole step are the one denominator of
    every loss (design rule 3); the rest are ranks that say yes to a question."""
    return collectives.all_reduce_sum(torch.tensor(values, dtype=torch.int64, device=device)).tolist()


def _set_learning_rate(engine: DeepSpeedEngine, recipe: Recipe, step: int) -> None:
    rate = recipe.optimizer.learning_rate * learning_rate_factor(recipe.schedule, step, recipe.training.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def _backward(engine: DeepSpeedEngine, loss_scale: LossScale, losses: dict[str, torch.Tensor], targets: int) -> None:
    """Backward of the summed losses over the global number of targets.

    DeepSpeed averages gradients over ranks and would divide by the accumulation steps: the factor undoes the first and
    ``scale_wrt_gas`` the second, which leaves sum / targets exactly.
    """
    loss = torch.stack([value.float() for value in losses.values()]).sum()
    loss = loss_scale.apply(loss * (collectives.world_size() / targets))
    engine.backward(loss, scale_wrt_gas=False)


def _negatives(recipe: Recipe) -> int:
    """Distractors of each target of a speech model, 0 for another."""
    masking = getattr(recipe.model, "masking", None)
    return masking.negatives if masking else 0


def _progress(engine: DeepSpeedEngine, loss_scale: LossScale, plan: SamplingPlan, done: int) -> dict[str, float]:
    norm = engine.get_global_grad_norm()
    values = {
        "grad_norm": float("nan") if norm is None else float(norm),
        "learning_rate": float(engine.optimizer.param_groups[0]["lr"]),
        "epoch": plan.epoch(done),
    }
    return values | ({"loss_scale": loss_scale.value} if loss_scale.enabled else {})


def _warn(messages: list[str]) -> dict[str, list[str]]:
    """Say what is wrong on rank 0's console; returns it for the log."""
    if collectives.rank() == 0:
        for message in messages:
            logger.warning("%s", message)
    return {"warnings": messages} if messages else {}
