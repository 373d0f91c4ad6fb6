"""`tessera demo`: the whole main job on real speech and real photographs, on this machine.

In: the bundled sample (or another folder with speech/ and images/). Out: a folder with two data sets, two runs, tokens,
exported weights and a report. Each part is a function that does what the command of the same name does; the table at
the end says where everything lies.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

RANKS = 2
SHARD_BYTES = 2**20
MARKER = ".tessera-demo"
"""Tells a folder that a demo made, which the next one may empty, from one that it must leave alone."""
SAMPLES = Path(__file__).parent.parent / "tests" / "data"
SPEECH_RECIPE = "speech/wav2vec2_tiny"
IMAGE_RECIPE = "image/autoencoder_tiny_ksom"


class DemoError(RuntimeError):
    """A part of the demo did not show what it is there to show."""


@dataclass
class Part:
    """One finished part, for the table at the end."""

    title: str
    result: str
    place: Path
    seconds: float


@dataclass
class Demo:
    """What the parts hand to one another."""

    out: Path
    samples: Path
    console: Console
    parts: list[Part] = field(default_factory=list)

    @property
    def speech_data(self) -> Path:
        return self.out / "data" / "speech"

    @property
    def image_data(self) -> Path:
        return self.out / "data" / "images"

    @property
    def speech_run(self) -> Path:
        return self.out / "runs" / "speech"

    @property
    def image_run(self) -> Path:
        return self.out / "runs" / "images"

    def do(self, title: str, place: Path, work: Callable[[Demo], str]) -> None:
        """Run one part under a heading and note how long it took."""
        self.console.rule(f"[bold]{len(self.parts) + 1}. {title}", align="left")
        started = time.perf_counter()
        result = work(self)
        self.parts.append(Part(title, result, place, time.perf_counter() - started))
        self.console.print(f"  {result}  [dim]({self.parts[-1].seconds:.0f} s)[/dim]", highlight=False)


def run_demo(out: Path, samples: Path | None) -> int:
    """Do the main job into ``out``; returns the exit code."""
    samples = samples or SAMPLES
    for kind in ("speech", "images"):
        if not (samples / kind).is_dir():
            raise FileNotFoundError(
                f"{samples / kind} does not exist: run the demo from a clone of the repository, "
                "or give --samples with speech/ and images/"
            )
    if out.exists() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise FileExistsError(f"--out {out} holds files that no demo made: give an empty or a new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARKER).write_text("made by `tessera demo`, which may empty this folder\n")
    # Nothing may be fetched while it runs: a part that tried to would fail here rather than at the user's.
    os.environ["HF_HUB_OFFLINE"] = "1"
    demo = Demo(out, samples, Console(soft_wrap=True))
    started = time.perf_counter()
    from pipeline.ray_session import ray_session

    with demo.console.status("starting Ray …"), ray_session(None) as resources:
        demo.console.print(f"Ray on this machine: {resources.get('CPU', 0):g} CPUs")
        demo.do("Prepare speech", demo.speech_data, prepare_speech)
        demo.do("Prepare images", demo.image_data, prepare_images)
        demo.do("Train speech: wav2vec 2.0 with KNN-simplex codes", demo.speech_run, train_speech)
        demo.do("Train images, kill a rank, resume", demo.image_run, train_images_with_a_kill)
        demo.do("Evaluate both", demo.speech_run / "metrics.json", evaluate_both)
        demo.do("Tokenise the images", demo.out / "tokens" / "images", tokenise_images)
    demo.do("Export the speech encoder to Hugging Face", demo.out / "export" / "speech", export_speech)
    demo.do("Write the report", demo.out / "report.html", write_report)
    _print_summary(demo, time.perf_counter() - started)
    return 0


def prepare_speech(demo: Demo) -> str:
    return _prepare(demo, "speech", demo.samples / "speech", demo.speech_data)


def prepare_images(demo: Demo) -> str:
    return _prepare(demo, "image", demo.samples / "images", demo.image_data)


def train_speech(demo: Demo) -> str:
    """Two Ray workers, ZeRO-1; checked: the loss is well below chance and the codebook is in use."""
    recipe = _train(demo, SPEECH_RECIPE, demo.speech_data, demo.speech_run, failures=0)
    line = _last_line(demo.speech_run)
    chance = math.log(recipe.model.masking.negatives + 1)
    _expect(
        line["loss_contrastive"] < 0.9 * chance,
        f"the contrastive loss {line['loss_contrastive']:.3f} is not below 0.9 × chance ({chance:.3f})",
    )
    _expect(line["codebook_usage"] > 0.5, f"only {line['codebook_usage']:.0%} of the codes are in use")
    return (
        f"contrastive loss {line['loss_contrastive']:.3f} (chance {chance:.3f}), accuracy {line['accuracy']:.1%}, "
        f"codes in use {line['codebook_usage']:.0%}, perplexity {line['codebook_perplexity']:.0f}"
    )


def train_images_with_a_kill(demo: Demo) -> str:
    """ZeRO-2; half-way a worker gets SIGKILL and Ray starts a new group, which resumes; checked: the same losses."""
    recipe = _load(IMAGE_RECIPE, demo.image_data)
    # Half-way between two checkpoints, so that there are steps to train again.
    every = recipe.training.checkpoint_every
    after = recipe.training.steps // 2 // every * every + every // 2
    killer = RankKiller(demo.image_run, after, demo.console)
    killer.start()
    try:
        _train(demo, IMAGE_RECIPE, demo.image_data, demo.image_run, failures=1)
    finally:
        killer.stop()
    _expect(killer.killed is not None, "the run ended before a rank was killed")
    compared, difference = compare_attempts(_log(demo.image_run))
    _expect(compared > 0, "no step was trained by both the killed and the resumed run")
    _expect(difference == 0.0, f"the resumed run's losses differ from the killed run's by up to {difference:.3g}")
    line = _last_line(demo.image_run)
    demo.console.print(
        f"  [green]resumed exactly[/green]: {compared} logged points were trained by the killed run and again by the "
        "resumed one; their losses are equal to the last bit"
    )
    return (
        f"killed at step {killer.killed}, resumed, {line['step']} steps done; reconstruction error {line['mse']:.4f}, "
        f"codes in use {line['codebook_usage']:.0%}"
    )


def evaluate_both(demo: Demo) -> str:
    from pipeline.evaluation import evaluate, metrics_table

    speech, images = evaluate(demo.speech_run), evaluate(demo.image_run)
    demo.console.print(metrics_table(speech))
    demo.console.print(metrics_table(images))
    return f"contrastive accuracy {speech['accuracy']:.1%}; PSNR {images['psnr']:.1f} dB, SSIM {images['ssim']:.3f}"


def tokenise_images(demo: Demo) -> str:
    from pipeline.export import tokenize

    return str(tokenize(demo.image_run, demo.image_data, demo.out / "tokens" / "images"))


def export_speech(demo: Demo) -> str:
    """Written in Hugging Face's format, loaded back by transformers, and compared on a real clip."""
    from pipeline.export import export
    from pipeline.export.huggingface import compare_with_transformers

    folder = export(demo.speech_run, demo.out / "export" / "speech", format="huggingface")
    difference = compare_with_transformers(demo.speech_run, folder)
    _expect(
        difference < 1e-4,
        f"transformers computes other features from the exported weights: difference {difference:.3g}",
    )
    return f"transformers loads it; its features differ from ours by at most {difference:.2g}"


def write_report(demo: Demo) -> str:
    from pipeline.evaluation import write_report as write

    file = write([demo.speech_run, demo.image_run], demo.out / "report.html")
    return f"one self-contained file, {file.stat().st_size / 1e6:.1f} MB"


class RankKiller:
    """Sends SIGKILL to a rank once the run has logged past a step and has a checkpoint to go back to."""

    def __init__(self, run: Path, after_step: int, console: Console, rank: int = RANKS - 1) -> None:
        self.run, self.after_step, self.rank, self.console = run, after_step, rank, console
        self.killed: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tessera-rank-killer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        from pipeline.training.run_folder import Run

        run = Run(self.run)
        while not self._stopped.wait(0.1):
            log = run.log()
            if not log or log[-1]["step"] < self.after_step or not run.list_checkpoints():
                continue
            pid = next(rank["pid"] for rank in run.environment()["ranks"] if rank["rank"] == self.rank)
            os.kill(pid, signal.SIGKILL)
            self.killed = log[-1]["step"]
            self.console.print(f"  [red]SIGKILL[/red] to rank {self.rank} (process {pid}) after step {self.killed}")
            return


def compare_attempts(log: list[dict[str, Any]]) -> tuple[int, float]:
    """Steps that more than one attempt logged, and the largest difference of their losses."""
    losses: dict[int, list[float]] = {}
    for line in log:
        losses.setdefault(line["step"], []).append(line["loss"])
    repeated = [values for values in losses.values() if len(values) > 1]
    return len(repeated), max((max(values) - min(values) for values in repeated), default=0.0)


def _prepare(demo: Demo, kind: Literal["speech", "image"], source: Path, out: Path) -> str:
    """Small shards, so that there are several; checked: the data set is whole, the broken files are set aside."""
    from data_prep import prepare, verify

    summary = prepare(kind, source, out, shard_bytes=SHARD_BYTES, splits="train=0.85,validation=0.15")
    for refusal in summary.refused:
        demo.console.print(f"  set aside: {refusal.path}: {refusal.reason}", highlight=False)
    problems = verify(out)
    _expect(not problems, f"{out} is damaged: {problems}")
    _expect(bool(summary.refused), "the broken files of the sample were not noticed")
    amount = f"{summary.samples} clips, {summary.hours:.2f} h" if kind == "speech" else f"{summary.samples} images"
    return f"{amount} in {summary.shards} shards, {len(summary.refused)} broken files set aside"


def _train(demo: Demo, recipe_name: str, data: Path, run: Path, failures: int) -> Any:
    from launch.follow import Follow
    from launch.ray_train import train_on_ray
    from launch.stop_file import StopFile

    recipe = _load(recipe_name, data)
    run.mkdir(parents=True)
    recipe_file = run / "launched.yaml"
    recipe_file.write_text(recipe.to_yaml())
    demo.console.print(
        f"  {recipe.name}: {RANKS} Ray workers, DeepSpeed ZeRO-{recipe.engine.zero_stage}, "
        f"quantizer {recipe.quantizer.kind}, {recipe.training.steps} steps of {recipe.batch.micro_batches} batches"
    )
    with StopFile(run) as stop, Follow(run, recipe, demo.console, warnings=True):
        train_on_ray(recipe_file, run, RANKS, stop, failures=failures)
    return recipe


def _load(recipe_name: str, data: Path) -> Any:
    from recipes.schema import load_recipe

    recipe = load_recipe(recipe_name, {"data.path": str(data.resolve())})
    recipe.check_ranks(RANKS)
    recipe.check_data()
    return recipe


def _log(run: Path) -> list[dict[str, Any]]:
    from pipeline.training.run_folder import Run

    return Run(run).log()


def _last_line(run: Path) -> dict[str, Any]:
    return _log(run)[-1]


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise DemoError(otherwise)


def _print_summary(demo: Demo, seconds: float) -> None:
    table = Table(title="What was made", title_justify="left", show_lines=False)
    for column in ("part", "result", "where"):
        table.add_column(column, overflow="fold")
    table.add_column("seconds", justify="right")
    for part in demo.parts:
        table.add_row(part.title, part.result, str(part.place), f"{part.seconds:.0f}")
    table.add_row("[bold]all", "", str(demo.out), f"[bold]{seconds:.0f}")
    demo.console.print(table)
    environment = os.path.relpath(sys.prefix)
    demo.console.print(f"Three commands to try next (after `. {environment}/bin/activate`):", highlight=False)
    for command in (
        f"tessera inspect {demo.image_run}",
        f"tessera train {IMAGE_RECIPE} data.path={demo.image_data} quantizer.kind=ema "
        f"--run {demo.out}/runs/images-ema --ranks 2",
        f"tessera plan {SPEECH_RECIPE} data.path={demo.speech_data} --ranks 2",
    ):
        demo.console.print(f"  {command}", highlight=False)
    demo.console.print(f"and open {demo.out / 'report.html'} in a browser")
