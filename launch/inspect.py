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
    table = Table(title=f"{path}: {kind}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in values.items():
        table.add_row(key, str(value))
    (console or Console()).print(table)


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
        "data": recipe.data.path,
        "steps": f"{log[-1]['step'] if log else 0} of {recipe.training.steps}",
        "starts": log[-1]["attempt"] if log else 0,
        "checkpoints": ", ".join(checkpoint.name for checkpoint in run.list_checkpoints()) or "none",
    }
    if log:
        facts |= {key: f"{value:.5g}" for key, value in log[-1].items() if isinstance(value, float)}
    return facts


def _manifest(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_text())
    return {key: len(value) if isinstance(value, list) else value for key, value in values.items()}
