"""`tessera evaluate`: a run's metrics over a whole split, in RUN/metrics.json.

In: a run folder and, if it is not the recipe's, a data set. Out: the metrics as a dictionary. May touch:
RUN/metrics.json, which is written beside and renamed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data import ImageCollation, ShardedDataset, epoch_batches, read_manifest
from pipeline.data.storage import write_whole
from pipeline.evaluation.catalogue import SYSTEMS, downstream_rows, present, shown
from pipeline.evaluation.classification import measure_classifier
from pipeline.evaluation.clustering import measure_map
from pipeline.evaluation.distances import NetworkFiles
from pipeline.evaluation.image import measure_images
from pipeline.evaluation.kept import keep_measures
from pipeline.evaluation.speech import measure_speech
from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    from rich.table import Table

    from recipes.schema import Recipe

METRICS_FILE = "metrics.json"
VALIDATION = "validation"


def evaluate(
    run_dir: str | Path,
    data: str | Path | None = None,
    split: str | None = None,
    batches: int | None = None,
    device: str | None = None,
    downstream: bool = False,
    layer: int | None = None,
    files: NetworkFiles | None = None,
    raw: bool = False,
) -> dict[str, Any]:
    """Measure the latest whole checkpoint of a run and write RUN/metrics.json.

    ``data`` is a data set folder (the recipe's by default), ``split`` one of its splits (validation where there is
    one, else the recipe's), ``batches`` a limit for a quick look, ``device`` "cuda" where there is one, else "cpu".
    Each sample is seen exactly once, without augmentation. ``downstream`` adds what frozen features of the encoder's
    ``layer`` are good for, see :mod:`pipeline.evaluation.downstream`; ``files`` of networks add distances of images,
    see :mod:`pipeline.evaluation.distances`. Without these, what the evaluation before found of the same checkpoint
    with the same data is kept, see :mod:`pipeline.evaluation.kept`. ``raw`` measures the weights that were trained
    where the run has averaged them too.

    Returned and written: what was measured (``name``, ``kind``, ``quantizer``, ``step``, ``data``, ``content``: its
    fingerprint, ``split``, ``complete``, ``weights``: "averaged" or "trained"), the metrics of
    :mod:`pipeline.evaluation.catalogue`, ``code_counts`` (groups × codes), and if they are known ``networks`` and
    ``downstream``. Raises FileNotFoundError for a folder without a run, ValueError for data of another kind, an unknown
    split, downstream measures of images, networks for speech or another network than a file is given for, and
    CheckpointError without a checkpoint.
    """
    run = Run(run_dir)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = run.latest_checkpoint()
    model, recipe = run.load_model(checkpoint, device=device, raw=raw)
    if downstream and recipe.data_kind != "speech":
        raise ValueError(f"{run.path} holds a model of {recipe.data_kind} data: downstream measures are of speech")
    if files is not None and recipe.data_kind != "image":
        raise ValueError(
            f"{run.path} holds a model of {recipe.data_kind} data: networks are given to compare images by"
        )
    if files is not None and recipe.model.kind in ("vit_som", "classifier"):
        raise ValueError(
            f"{run.path} holds a model of kind {recipe.model.kind}, whose images are not compared by networks: leave "
            "their files out"
        )
    dataset = open_split(recipe, data, split)
    limited = islice(ordered_batches(recipe, dataset), batches)
    if recipe.model.kind == "wav2vec2":
        metrics, counts = measure_speech(model, limited, recipe.model.masking.negatives, device)
    elif recipe.model.kind == "vit_som":
        metrics, counts = measure_map(model, limited, device)
    elif recipe.model.kind == "classifier":
        metrics, counts = measure_classifier(model, limited, device)
    else:
        metrics, counts = measure_images(model, limited, device, files or NetworkFiles())
    result = {
        "name": recipe.name,
        "kind": recipe.data_kind,
        "quantizer": recipe.quantizer.kind,
        "weights": "averaged" if recipe.training.weight_ema and not raw else "trained",
        "step": int(checkpoint.name.removeprefix("step-")) if checkpoint else 0,
        "data": str(dataset.path),
        "content": dataset.manifest.fingerprint(),
        "split": dataset.split,
        "complete": metrics["samples"] == len(dataset),
        **metrics,
        "code_counts": counts,
    }
    if downstream:
        from pipeline.evaluation.downstream import measure_downstream

        result["downstream"] = measure_downstream(model, recipe, dataset.path, layer, device)
    result = keep_measures(read_metrics(run.path) or {}, result)
    write_metrics(run.path / METRICS_FILE, result)
    return result


def open_split(recipe: Recipe, data: str | Path | None = None, split: str | None = None) -> ShardedDataset:
    """The split to evaluate on: the one named, else validation where there is one, else the recipe's. Of a mixture, the
    first data set is taken.
    """
    sources = recipe.data.sources
    if not data and not sources:
        raise ValueError(f"recipe {recipe.name} names no data set: give one with --data")
    folder = data or sources[0].path
    manifest = read_manifest(folder)
    if manifest.kind != recipe.data_kind:
        raise ValueError(
            f"{folder} holds {manifest.kind} data, the run was trained on {recipe.data_kind}: give other --data"
        )
    validation = manifest.splits.get(VALIDATION)
    default = VALIDATION if validation is not None and validation.samples else sources[0].split if sources else "train"
    return ShardedDataset(folder, split or default)


def ordered_batches(recipe: Recipe, dataset: ShardedDataset) -> Iterator[Any]:
    """Batches that hold each sample of the split once, in order, without augmentation."""
    return epoch_batches(dataset, plain_collation(recipe), recipe.batch)


def plain_collation(recipe: Recipe) -> Any:
    """The recipe's collation without augmentation: what of a sample depends on nothing but the sample."""
    from pipeline.models import build_collation

    if recipe.data_kind == "image":
        return ImageCollation(recipe.data, recipe.seed, augment=False)
    return build_collation(recipe)


def write_metrics(file: Path, metrics: dict[str, Any]) -> None:
    """Write whole or not at all. What is not finite becomes null: JSON has no word for it."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }
    write_whole(file, json.dumps(finite, allow_nan=False).encode())


def read_metrics(run_dir: str | Path) -> dict[str, Any] | None:
    """RUN/metrics.json, or None when the run was not evaluated yet."""
    file = Path(run_dir) / METRICS_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def metrics_table(metrics: dict[str, Any]) -> Table:
    """A rich table: each metric, its value and how to read it."""
    scope = f"{metrics['split']} split" + ("" if metrics["complete"] else ", a part of it")
    table = _table(f"{metrics['name']} ({metrics['quantizer']}), step {metrics['step']}, {scope}")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", style="bold", no_wrap=True)
    table.add_column("meaning", style="dim")
    for measure in present([metrics]):
        table.add_row(measure.name, shown(measure, metrics), measure.meaning)
    return table


def networks_told(metrics: dict[str, Any]) -> list[str]:
    """A line for each network that images were compared by: which file it was."""
    return [f"{name}: {given['file']}, sha256 {given['sha256']}" for name, given in metrics.get("networks", {}).items()]


def downstream_table(metrics: dict[str, Any]) -> Table:
    """A rich table of the downstream measures: a row each, a column for the baselines and the run."""
    found = metrics["downstream"]
    table = _table(f"frozen features of layer {found['layer']} of {found['layers']}, {found['clips']} clips")
    table.add_column("measure", no_wrap=True)
    for name in SYSTEMS.values():
        table.add_column(name, justify="right", style="bold", no_wrap=True)
    table.add_column("meaning", style="dim")
    for name, values, meaning in downstream_rows(found):
        table.add_row(name, *values, meaning)
    return table


def _table(title: str) -> Table:
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, pad_edge=False)
