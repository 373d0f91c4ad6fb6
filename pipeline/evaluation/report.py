"""`tessera report`: one self-contained HTML file about one or more runs.

In: run folders. Out: the file. May touch: that file, and RUN/metrics.json of runs that were not evaluated yet.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.storage import write_whole
from pipeline.evaluation import page
from pipeline.evaluation.catalogue import SYSTEMS, downstream_rows, present, shown
from pipeline.evaluation.figures import count_chart, line_chart, rank_chart
from pipeline.evaluation.image_figures import image_pictures
from pipeline.evaluation.map_figures import map_pictures
from pipeline.evaluation.run_view import RunView, open_runs
from pipeline.evaluation.speech_figures import speech_pictures
from pipeline.evaluation.usage_figures import usage_pictures

KINDS = {"speech": "Speech", "image": "Images"}
CURVES = {
    "loss": "Loss, all parts",
    "contrastive": "Contrastive loss",
    "accuracy": "Contrastive accuracy",
    "loss_reconstruction": "Reconstruction loss",
    "mse": "Reconstruction error (MSE)",
    "loss_classification": "Classification loss",
    "class_accuracy": "Accuracy",
    "class_accuracy_top5": "Top-5 accuracy",
    "quantizer_distance": "Distance to the map",
    "quantizer_topographic_error": "Topographic error of the map",
    "codebook_perplexity": "Codebook perplexity",
    "codebook_usage": "Share of codes in use",
}
"""Shown at once, in this order; everything else that was logged is folded away."""
PROTOCOL = (
    "What a layer's outputs are good for, with nothing of the encoder trained further: beside log-mel bands and the "
    "encoder as its training began."
)
BOOKKEEPING = {"seconds", "epoch"}


def write_report(runs: Sequence[str | Path] | str | Path, out: str | Path | None = None) -> Path:
    """Write the report of ``runs`` to ``out`` (RUN/report.html of the first run by default) and return its path.

    Runs of one kind are compared in the same charts; runs that were not evaluated at their newest checkpoint are
    evaluated first. A run without a checkpoint is shown as far as its log goes. Raises FileNotFoundError for a folder
    that holds no run.
    """
    paths = [runs] if isinstance(runs, str | Path) else list(runs)
    views = open_runs(paths)
    title = (
        views[0].name
        if len(views) == 1
        else "Runs compared"
        if len({v.recipe.data_kind for v in views}) == 1
        else "Runs"
    )
    body = [page.heading(title, 1), page.paragraph(f"Tessera report, {datetime.date.today():%-d %B %Y}")]
    body.append(page.cards(run_card(view) for view in views))
    for kind, name in KINDS.items():
        members = [view for view in views if view.recipe.data_kind == kind]
        if members:
            body += kind_section(name, kind, members)
    file = Path(out) if out is not None else Path(paths[0]) / "report.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, page.document(f"Tessera: {title}", body).encode())
    return file


def run_card(view: RunView) -> str:
    """What the run was: recipe, length, restarts."""
    recipe, history = view.recipe, view.history
    quantizer = recipe.quantizer
    sizes = [f"{getattr(quantizer, 'codes', 0)} codes" if getattr(quantizer, "codes", None) else ""]
    if getattr(quantizer, "groups", 1) > 1:
        sizes.append(f"{quantizer.groups} groups")
    if getattr(quantizer, "grid", None):
        sizes.append("grid " + " × ".join(map(str, quantizer.grid)))
    batch = recipe.batch
    size = f"{batch.seconds:g} s of speech" if batch.seconds else f"{batch.samples} images"
    done = history.lines[-1]["step"] if history.lines else 0
    facts = [
        ("recipe", recipe.description or recipe.name),
        ("model", recipe.model.kind + (f", {parameters(view.model)} parameters" if view.model is not None else "")),
        ("quantizer", ", ".join([quantizer.kind, *filter(None, sizes)])),
        ("batch", f"{batch.micro_batches} micro-batches of {size}"),
        ("optimiser", f"{recipe.optimizer.kind}, learning rate {recipe.optimizer.learning_rate:g}"),
        ("engine", f"DeepSpeed ZeRO {recipe.engine.zero_stage}, {recipe.engine.precision}"),
        ("steps", f"{done:,} of {recipe.training.steps:,} in {duration(history.seconds)}"),
    ]
    for number, (phase, before) in enumerate(zip(recipe.phases, view.before, strict=False), start=1):
        steps = f"{before.lines[-1]['step'] if before.lines else 0:,} of {phase.training.steps:,} steps"
        facts.append((f"phase {number}", f"{phase.quantizer.kind}, {steps} in {duration(before.seconds)}"))
    if history.resumed:
        facts.append(("restarts", restarts(view)))
    if "ranks" in view.environment:
        facts.append(("ranks", str(len(view.environment["ranks"]))))
    if view.dataset is not None:
        facts.append(("evaluated on", f"{len(view.dataset):,} samples of the {view.dataset.split} split"))
    return page.card(view.name, view.colour, facts)


def restarts(view: RunView) -> str:
    """How often the run was resumed, and whether the steps that were done again came out the same."""
    history = view.history
    text = f"resumed {len(history.resumed)} time{'' if len(history.resumed) == 1 else 's'}"
    difference = history.largest_difference("loss")
    if difference is None:
        return text
    same = "to the last digit the same loss" if difference == 0 else f"losses within {difference:.2g}"
    return f"{text}; {len(history.repeated)} logged steps done again, {same}"


def kind_section(name: str, kind: str, views: Sequence[RunView]) -> list[str]:
    """Metrics, curves, codes and pictures of the runs of one kind."""
    parts = [page.heading(name)]
    parts += [page.note(f"{view.name}: {view.missing}") for view in views if view.missing]
    measured = [view for view in views if view.metrics is not None]
    if measured:
        parts += [page.heading("Metrics", 3), metrics_rows(measured)]
    probed = [view for view in measured if view.metrics and "downstream" in view.metrics]
    if probed:
        parts += [page.heading("Frozen features", 3), page.paragraph(PROTOCOL), *map(downstream_rows_of, probed)]
    main, rest = curve_figures(views, kind)
    if main:
        parts += [page.heading("Training", 3), page.cards(main)]
    if rest:
        parts.append(page.details(f"{len(rest)} more curves", page.cards(rest)))
    counts = [
        (view.name, view.colour, view.metrics["code_counts"])
        for view in measured
        if view.metrics and view.metrics["code_counts"]
    ]
    if counts:
        charts = [
            page.figure(count_chart("How often codes occur", counts)),
            page.figure(rank_chart("Codes by frequency", counts)),
        ]
        parts += [page.heading("Use of the codebook", 3), page.cards(charts)]
    parts += usage_pictures(views)
    if kind == "speech":
        return parts + speech_pictures(views)
    parts += image_pictures(views)
    for view in views:
        parts += map_pictures(view)
    return parts


def metrics_rows(views: Sequence[RunView]) -> str:
    """The metrics of every run side by side."""
    metrics = [view.metrics for view in views if view.metrics is not None]
    rows = [
        (measure.name, [shown(measure, values) for values in metrics], measure.meaning) for measure in present(metrics)
    ]
    return page.table([view.name for view in views], rows)


def downstream_rows_of(view: RunView) -> str:
    """A run's downstream measures beside its baselines."""
    assert view.metrics is not None
    found = view.metrics["downstream"]
    name = f"{view.name}: layer {found['layer']} of {found['layers']}, {found['clips']} clips"
    return page.paragraph(name) + page.table(list(SYSTEMS.values()), downstream_rows(found))


def curve_figures(views: Sequence[RunView], kind: str) -> tuple[list[str], list[str]]:
    """The curves that matter, and the rest."""
    logged = list(dict.fromkeys(name for view in views for run in view.series for name in run.history.names))
    # Where the loss has one part, its sum says nothing new.
    if sum(name.startswith("loss_") for name in logged) == 1:
        logged.remove("loss")
    main = [name for name in CURVES if name in logged]
    rest = [name for name in logged if name not in CURVES and name not in BOOKKEEPING]
    chance = chance_level(views) if kind == "speech" else None
    return (
        [page.figure(curve(name, views, chance if name == "contrastive" else None)) for name in main],
        [page.figure(curve(name, views)) for name in rest],
    )


def curve(name: str, views: Sequence[RunView], level: tuple[float, str] | None = None) -> str:
    """One chart with the runs that logged ``name``."""
    title = CURVES.get(name) or name.replace("_", " ").replace("/", ", ").capitalize()
    series = [series for view in views for series in view.series if name in series.history.names]
    return line_chart(title, name, series, level)


def chance_level(views: Sequence[RunView]) -> tuple[float, str] | None:
    """The loss of guessing, where all runs have the same number of distractors."""
    numbers = {view.recipe.model.masking.negatives for view in views}
    if len(numbers) != 1:
        return None
    number = numbers.pop() + 1
    return math.log(number), f"chance: log({number}) = {math.log(number):.2f}"


def parameters(model: object) -> str:
    """How many weights a model learns, in words."""
    number = sum(parameter.numel() for parameter in model.parameters())  # type: ignore[attr-defined]
    return f"{number / 1e6:.1f} million" if number >= 1e6 else f"{number / 1e3:.0f} thousand"


def duration(seconds: float) -> str:
    """Time in the unit that reads well."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
