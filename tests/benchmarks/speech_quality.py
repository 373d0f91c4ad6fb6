"""What `speech/wav2vec2_tiny` learns with each quantizer on hours of real speech: one table.

    python -m tests.benchmarks.speech_quality --out quality                      # the recipe's steps
    python -m tests.benchmarks.speech_quality --out quality --steps 2000 --ranks 2
    python -m tests.benchmarks.speech_quality --out quality --corpus corpus/speech --quantizers gumbel ksom

Prepares the corpus of `make corpus` (or the tree ``--corpus``) with whole speakers held out, trains the recipe with
each quantizer for the same steps on the same batches, evaluates each run with `tessera evaluate --downstream`, and
prints the table beside log-mel bands and the untrained encoder. What is done is not done again: killed, the same
command goes on, a training from its newest checkpoint. Out: ``OUT/data``, ``OUT/runs/KIND-STEPS``, ``OUT/table.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data import read_manifest
from pipeline.data.manifest import MANIFEST_NAME
from pipeline.data.storage import write_whole
from pipeline.evaluation.catalogue import percent
from pipeline.evaluation.labels import LANGUAGES_FILE

RECIPE = "speech/wav2vec2_tiny"
QUANTIZERS = ["gumbel", "knn_simplex", "ema", "ksom", "affine"]
HELD_OUT = "train=0.8,validation=0.2"  # of speakers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for data set, runs and table")
    parser.add_argument("--corpus", type=Path, help="speech tree of tests.benchmarks.corpus (default: made in OUT)")
    parser.add_argument("--steps", type=int, help="optimiser steps of each run (default: the recipe's)")
    parser.add_argument("--ranks", type=int, default=1, help="processes a training takes; the result is the same")
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS, choices=QUANTIZERS)
    parser.add_argument("--recipe", default=RECIPE, help="another speech recipe")
    parser.add_argument("overrides", nargs="*", help="more overrides of the recipe: key=value")
    options = parser.parse_args()
    data = prepare(options.out, options.corpus)
    steps = options.steps or recipe_steps(options.recipe)
    measured = []
    for kind in options.quantizers:
        overrides = [f"quantizer.kind={kind}", f"training.steps={steps}", *options.overrides]
        measured.append(
            measure(options.recipe, data, options.out / "runs" / f"{kind}-{steps}", overrides, options.ranks)
        )
        table = table_of(measured, data)
        write_whole(options.out / "table.md", table.encode())
    print(table)


def prepare(out: Path, corpus: Path | None) -> Path:
    """The prepared data set, with the languages that the corpus's speakers are named after."""
    if corpus is None:
        corpus = out / "corpus" / "speech"
        done = out / "corpus" / "speech.done"
        if not done.exists():
            _run("tests.benchmarks.corpus", "--out", str(out / "corpus"), "--only", "speech")
            done.touch()
    data = out / "data"
    if not (data / MANIFEST_NAME).exists():
        _run("launch.cli", "prepare", "speech", str(corpus), str(data), "--split", HELD_OUT, "--split-by-speaker")
    lines = [f"{speaker}\t{language_of(speaker)}\n" for speaker in read_manifest(data).classes]
    write_whole(data / LANGUAGES_FILE, "".join(lines).encode())
    return data


def language_of(speaker: str) -> str:
    """The corpus names its speakers SOURCE-LANGUAGE or SOURCE-LANGUAGE-VOICE."""
    return speaker.split("-")[1]


def recipe_steps(recipe: str) -> int:
    from recipes.schema import load_recipe

    return load_recipe(recipe).training.steps


def measure(recipe: str, data: Path, run: Path, overrides: Sequence[str], ranks: int) -> dict[str, Any]:
    """Train and evaluate, as far as that was not done; the run's metrics."""
    from recipes.schema import load_recipe

    wanted = load_recipe(recipe, [f"data.path={data}", *overrides])
    metrics = run / "metrics.json"
    found = json.loads(metrics.read_text()) if metrics.exists() else {}
    if found.get("step") != wanted.training.steps or "downstream" not in found:
        print(f"{run.name}: training", file=sys.stderr, flush=True)
        _run("launch.cli", "train", recipe, f"data.path={data}", *overrides, "--run", str(run), "--ranks", str(ranks))
        print(f"{run.name}: evaluating", file=sys.stderr, flush=True)
        _run("launch.cli", "evaluate", str(run), "--downstream")
        found = json.loads(metrics.read_text())
    return found


def table_of(measured: Sequence[dict[str, Any]], data: Path) -> str:
    """Markdown: a row for each baseline and each quantizer."""
    first = measured[0]["downstream"]
    tasks = [task for task in ("speaker", "language", "abx") if task in first["tasks"]]
    chance = [percent(first["tasks"][task]["chance"]) for task in tasks]
    names = {"speaker": "speaker", "language": "language", "abx": "ABX error"}
    columns = ["features", "accuracy", "loss (chance)", "perplexity", "codes in use", *(names[task] for task in tasks)]
    rows = [["guessing", *[""] * 4, *chance]]
    for system, name in {"log_mel": "log-mel", "untrained": "untrained encoder"}.items():
        rows.append([name, *[""] * 4, *(percent(first["systems"][system][task]) for task in tasks)])
    for metrics in measured:
        rows.append(
            [
                metrics["quantizer"],
                percent(metrics["accuracy"]) if metrics["accuracy"] is not None else "–",
                f"{_number(metrics['contrastive_loss'], 3)} ({metrics['chance_loss']:.3f})",
                _number(metrics["codebook_perplexity"], 1),
                percent(metrics["codebook_usage"]),
                *(percent(metrics["downstream"]["systems"]["trained"][task]) for task in tasks),
            ]
        )
    lines = [columns, ["---"] * len(columns), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n{_about(measured[0], data)}\n"


def _about(metrics: dict[str, Any], data: Path) -> str:
    """What the table's figures are of."""
    manifest, found = read_manifest(data), metrics["downstream"]
    heard, held = manifest.splits["train"], manifest.splits[metrics["split"]]
    about = [
        f"{metrics['step']} steps on {heard.seconds / 3600:.2f} h of {len(heard.labels)} speakers. Accuracy, loss, "
        f"perplexity and codes in use: of {held.seconds / 3600:.2f} h of {len(held.labels)} other speakers. The rest: "
        f"frozen features, of the encoder layer {found['layer']} of {found['layers']}."
    ]
    for task, of_task in found["tasks"].items():
        if task == "abx":
            about.append(f"ABX: {of_task['triples']} triples.")
        else:
            sizes = f"tested on {of_task['tested']} clips of {of_task['classes']} {task}s"
            about.append(f"{task.capitalize()}: balanced accuracy of a linear probe, {sizes}.")
    about += [f"Left out, {task}: {why}." for task, why in found["left_out"].items()]
    return " ".join(about)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _run(module: str, *arguments: str) -> None:
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([sys.executable, "-m", module, *arguments], check=True, env=environment, stdout=sys.stderr)


if __name__ == "__main__":
    main()
