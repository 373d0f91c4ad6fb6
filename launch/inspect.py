"""`tessera inspect`: what a run, a checkpoint, a shard or a data set holds, told from its files.

In: a path. Out: a printed table. Raises ValueError for a path that is none of these.
"""

from __future__ import annotations

import collections
import json
import tarfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_contents(path: Path, console: Console | None = None) -> None:
    """Print what ``path`` holds."""
    kind, values = contents(path)
    console = console or Console()
    console.print(f"{path}: {kind}", soft_wrap=True, highlight=False)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key, str(value))
    console.print(table)


def contents(path: Path) -> tuple[str, dict[str, Any]]:
    """What ``path`` is, and its facts."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: give a run, a checkpoint, a shard or a data set")
    if path.is_file() and path.suffix == ".tar":
        return "shard", _shard(path)
    if (path / "recipe.yaml").is_file():
        return "run", _run(path)
    if path.name.startswith("step-") and (path / "manifest.json").is_file():
        from pipeline.training.checkpoint import describe

        return "checkpoint", describe(path)
    if (path / "manifest.json").is_file():
        return "data set", _manifest(path / "manifest.json")
    raise ValueError(
        f"{path} is neither a run (recipe.yaml), a checkpoint (step-…/manifest.json), a shard (.tar) nor a data "
        "set (manifest.json)"
    )


def _shard(path: Path) -> dict[str, Any]:
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
    except tarfile.TarError as error:
        raise ValueError(f"{path} is not a readable tar ({error}): prepare the data set again") from error
    suffixes = collections.Counter("." + member.name.partition(".")[2] for member in members)
    keys = dict.fromkeys(member.name.partition(".")[0] for member in members)
    return {
        "samples": len(keys),
        "members": ", ".join(f"{count} × {suffix}" for suffix, count in sorted(suffixes.items())),
        "bytes": f"{path.stat().st_size:,}",
        "first key": next(iter(keys), "none"),
    }


def _run(path: Path) -> dict[str, Any]:
    from pipeline.training.run_folder import Run

    run = Run(path)
    recipe, log = run.recipe(), run.log()
    facts: dict[str, Any] = {
        "recipe": recipe.name,
        "model": recipe.model.kind,
        "quantizer": recipe.quantizer.kind,
        "data": ", ".join(str(source.path) for source in recipe.data.sources) or None,
        "steps": f"{log[-1]['step'] if log else 0} of {recipe.training.steps}",
        "starts": log[-1]["attempt"] if log else 0,
        "checkpoints": ", ".join(checkpoint.name for checkpoint in run.list_checkpoints()) or "none",
    }
    for number, (folder, phase) in enumerate(run.phases(recipe)[:-1], start=1):
        lines = folder.log()
        done = f"{lines[-1]['step'] if lines else 0} of {phase.training.steps} steps"
        facts[f"phase {number}"] = f"{phase.quantizer.kind}, {done}, in {folder.path}"
    if log:
        facts |= {key: f"{value:.5g}" for key, value in log[-1].items() if isinstance(value, float)}
    return facts


def _manifest(file: Path) -> dict[str, Any]:
    """A prepared data set, or a set of tokens: both list their shards by split."""
    values = json.loads(file.read_text())
    facts = {key: value for key, value in values.items() if key != "splits" and value is not None}
    if isinstance(facts.get("classes"), list):
        names = facts["classes"]
        facts["classes"] = f"{len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
    for name, split in values.get("splits", {}).items():
        shards = split["shards"]
        total = {key: sum(shard.get(key, 0) for shard in shards) for key in ("samples", "seconds", "tokens", "bytes")}
        amounts = [
            f"{total['samples']:,} samples",
            f"{total['seconds'] / 3600:.2f} h" if total["seconds"] else "",
            f"{total['tokens']:,} tokens" if total["tokens"] else "",
            f"{len(shards)} shards, {total['bytes'] / 1e6:.1f} MB",
        ]
        facts[f"split {name}"] = ", ".join(filter(None, amounts))
    return facts
