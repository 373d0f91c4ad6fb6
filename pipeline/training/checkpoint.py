"""Checkpoints that exist whole or not at all (design rule 7), in a form that any layout of ranks reads.

``checkpoints/step-00001000/`` holds ``rank-00000.safetensors`` …, each with the stretches of weights and moments that
its rank kept (:mod:`pipeline.training.engine_state`) and of the weights' average, if there is one, rank 0's with the
buffers too, and copies of the recipe and the environment. ``manifest.json`` comes last, with every file's sha256; a
folder without it is not a checkpoint.

Random state is not in it: every draw is a function of the seed, the step and the sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from pipeline.training.average import WeightAverage
    from pipeline.training.engine_state import Piece

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
_BUFFER = "buffer"
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
    loss: float | None
    """Average since the log line before, if there was one."""
    data_fingerprint: str
    data: dict[str, Any] = Field(default_factory=dict)
    """What the fingerprint covers, so that a refused resume can say what changed."""
    codebook_checksum: str
    parameters: dict[str, list[int]]
    """Name → shape."""
    optimizer_steps: dict[str, float]
    """Name → steps that the optimiser has made for it."""
    loss_scale: tuple[float, int] | None = None
    """fp16's factor on the loss, and the good steps since it changed."""
    files: dict[str, tuple[int, str]]
    """Relative path → bytes, sha256."""


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint taken after ``step`` optimiser steps."""
    return f"step-{step:08d}"


def rank_file(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def piece_key(piece: Piece) -> str:
    """Name of a piece in its rank's file."""
    return f"{piece.part}/{piece.start}/{piece.name}"


def buffer_key(name: str) -> str:
    """Name of a buffer in rank 0's file."""
    return f"{_BUFFER}/0/{name}"


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
        if digest_file(file)[1] != digest:
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


class CheckpointReader:
    """The pieces of a checkpoint put together again, read where they are needed. A context manager: it keeps the ranks'
    files open."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.manifest = read_manifest(checkpoint)
        self._stack = ExitStack()
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)  # start, file, key

    def __enter__(self) -> CheckpointReader:
        from safetensors import safe_open

        for rank in range(self.manifest.world_size):
            file = self._stack.enter_context(safe_open(self.checkpoint / rank_file(rank), framework="pt"))
            for key in file.keys():  # noqa: SIM118  # a safetensors file is no mapping
                part, start, name = key.split("/", 2)
                self._pieces[name, part].append((int(start), file, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece[0])
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, part: str, start: int, numel: int) -> torch.Tensor | None:
        """As :class:`pipeline.training.engine_state.Source` wants it."""
        import torch

        if (name, part) not in self._pieces:
            return None
        values = torch.empty(numel, dtype=torch.float32)
        missing = numel
        for first, file, key in self._pieces[name, part]:
            piece = file.get_slice(key)
            begin, end = max(start, first), min(start + numel, first + piece.get_shape()[0])
            if begin < end:
                values[begin - start : end - start] = piece[begin - first : end - first]
                missing -= end - begin
        if missing:
            raise CheckpointError(f"{self.checkpoint} lacks {missing} of {numel} values of {name} ({part})")
        return values

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's buffers by name, as they were saved."""
        return {
            name: file.get_tensor(key)
            for (name, part), pieces in self._pieces.items()
            for _, file, key in pieces
            if part == _BUFFER
        }


def load_checkpoint(
    engine: DeepSpeedEngine, checkpoint: Path, average: WeightAverage | None = None
) -> CheckpointManifest:
    """Restore weights, optimiser and codebooks into ``engine``, and the weights' average, bit for bit, whatever number
    of ranks and ZeRO stage wrote them. Called by every rank.

    Raises :class:`CheckpointError` when the checkpoint is of another model.
    """
    from pipeline.training.engine_state import load_state, parameter_shapes

    with CheckpointReader(checkpoint) as reader:
        manifest = reader.manifest
        _check_model(checkpoint, manifest.parameters, parameter_shapes(engine.module))
        load_state(engine, reader, reader.buffers(), manifest.optimizer_steps)
        if average is not None:
            average.load(reader)
    return manifest


def read_weights(checkpoint: Path, raw: bool = False) -> dict[str, torch.Tensor]:
    """The model's state dict in fp32 on the CPU: weights and codebook state, gathered from every rank's files. Weights
    of which there is an average are that, unless ``raw``."""
    from pipeline.training.engine_state import AVERAGE, WEIGHT

    with CheckpointReader(checkpoint) as reader:
        state = reader.buffers()
        for name, shape in reader.manifest.parameters.items():
            values = None if raw else reader.read(name, AVERAGE, 0, _numel(shape))
            if values is None:
                values = reader.read(name, WEIGHT, 0, _numel(shape))
            if values is None:
                raise CheckpointError(f"{checkpoint} lacks the weight {name}")
            state[name] = values.view(shape)
    return state


def _check_model(checkpoint: Path, saved: Mapping[str, list[int]], here: Mapping[str, list[int]]) -> None:
    for name in sorted({*saved, *here}):
        if saved.get(name) != here.get(name):
            raise CheckpointError(
                f"{checkpoint} is of another model: {name} has shape {saved.get(name, 'none')} there and "
                f"{here.get(name, 'none')} here; bring the recipe back that trained it"
            )


def _numel(shape: list[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel


def digest_file(file: Path) -> tuple[int, str]:
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
