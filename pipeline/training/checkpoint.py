"""Checkpoints that exist whole or not at all (design rule 7).

In: a DeepSpeed engine and the step it has reached. Out: ``checkpoints/step-00001000/``, written beside under a hidden
name, hashed, fsynced and renamed by rank 0; a folder without its ``manifest.json`` is not a checkpoint. May touch: the
checkpoints folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from pipeline import collectives
from pipeline.data.manifest import fsync_folder, write_whole

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used; the message says which, why and what to do."""


class CheckpointManifest(BaseModel):
    """What a checkpoint holds and how it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: int
    step: int
    world_size: int
    zero_stage: int
    precision: str
    data_fingerprint: str
    codebook_checksum: str
    files: dict[str, tuple[int, str]]
    """Relative path → bytes, sha256."""


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint taken after ``step`` optimiser steps."""
    return f"step-{step:08d}"


def save_checkpoint(
    engine: DeepSpeedEngine,
    folder: Path,
    step: int,
    *,
    data_fingerprint: str,
    codebook_checksum: str,
    zero_stage: int,
    precision: str,
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` with all ranks and drop all but the newest ``keep``.

    Returns the finished folder. Called by every rank; returns on all of them only when it is whole on disk.
    """
    target = folder / checkpoint_name(step)
    partial = folder / f".partial-{checkpoint_name(step)}"
    if collectives.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".partial-*"):
            shutil.rmtree(leftover)
    collectives.barrier()
    engine.save_checkpoint(str(folder), tag=partial.name, client_state={"step": step}, save_latest=False)
    collectives.barrier()
    if collectives.rank() == 0:
        manifest = CheckpointManifest(
            format_version=FORMAT_VERSION,
            step=step,
            world_size=collectives.world_size(),
            zero_stage=zero_stage,
            precision=precision,
            data_fingerprint=data_fingerprint,
            codebook_checksum=codebook_checksum,
            files={str(file.relative_to(partial)): _digest(file) for file in _files(partial)},
        )
        write_whole(partial / MANIFEST, manifest.model_dump_json(indent=1).encode())
        if target.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(target)
        partial.rename(target)
        fsync_folder(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    collectives.barrier()
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first; found by looking, not by trusting a pointer."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / MANIFEST).is_file())


def read_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest of a finished checkpoint; raises :class:`CheckpointError` when it can't be read."""
    try:
        values = json.loads((checkpoint / MANIFEST).read_text())
        if values.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{checkpoint} has format version {values.get('format_version')}, this Tessera reads {FORMAT_VERSION}: "
                "use the version that wrote it"
            )
        return CheckpointManifest.model_validate(values)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / MANIFEST} can't be read ({error})") from error


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, or None: sizes first, then every sha256."""
    try:
        manifest = read_manifest(checkpoint)
    except CheckpointError as error:
        return str(error)
    for name, (size, digest) in manifest.files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, {size} were written"
        if _digest(file)[1] != digest:
            return f"{file} has another sha256 than was written"
    return None


def find_latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None, and the damage of the newer ones that were passed over."""
    passed_over: list[str] = []
    for checkpoint in reversed(list_checkpoints(folder)):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, passed_over
        passed_over.append(damage)
    return None, passed_over


def check_layout(checkpoint: Path, world_size: int, zero_stage: int) -> CheckpointManifest:
    """The manifest of a checkpoint that ``world_size`` ranks under ``zero_stage`` can load.

    Raises :class:`CheckpointError` when another number of ranks or another stage wrote it.
    """
    manifest = read_manifest(checkpoint)
    if manifest.world_size != world_size:
        raise CheckpointError(
            f"{checkpoint} was written by {manifest.world_size} ranks and {world_size} are here: "
            f"resume with {manifest.world_size} ranks"
        )
    if manifest.zero_stage != zero_stage:
        raise CheckpointError(
            f"{checkpoint} was written with engine.zero_stage={manifest.zero_stage}, not {zero_stage}: "
            f"resume with engine.zero_stage={manifest.zero_stage}"
        )
    return manifest


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Path, zero_stage: int) -> CheckpointManifest:
    """Restore weights, optimiser and codebooks into ``engine``, bit for bit.

    Raises :class:`CheckpointError` when the checkpoint was written by another number of ranks or another ZeRO stage.
    """
    manifest = check_layout(checkpoint, collectives.world_size(), zero_stage)
    path, _ = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {checkpoint}")
    return manifest


def read_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32 on the CPU: weights and codebook state, gathered from every rank's files."""
    import torch

    manifest = read_manifest(checkpoint)
    states = sorted(checkpoint.glob("*model_states.pt"))
    if manifest.zero_stage == 0:
        # weights_only=False: DeepSpeed pickles its own settings beside the tensors; the files' hashes are ours.
        return dict(torch.load(states[0], map_location="cpu", weights_only=False)["module"])
    from pipeline.training.engine import import_deepspeed

    import_deepspeed()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    said = io.StringIO()  # it prints its progress and a bar
    with redirect_stdout(said), redirect_stderr(said):
        return dict(get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _digest(file: Path) -> tuple[int, str]:
    """Size and sha256 of a file, which is fsynced on the way."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
    return file.stat().st_size, digest


def describe(checkpoint: Path) -> dict[str, Any]:
    """What ``tessera inspect`` shows of a checkpoint."""
    manifest = read_manifest(checkpoint)
    return {
        "step": manifest.step,
        "ranks": manifest.world_size,
        "ZeRO stage": manifest.zero_stage,
        "precision": manifest.precision,
        "codebooks": manifest.codebook_checksum,
        "data": manifest.data_fingerprint,
        "files": len(manifest.files),
        "bytes": sum(size for size, _ in manifest.files.values()),
        "damage": find_damage(checkpoint) or "none",
    }
