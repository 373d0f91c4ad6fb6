"""Writing checkpoints while training goes on.

In: an engine between two steps. Out: a whole checkpoint, or none (design rule 7). Training waits for the copy to host
memory only; a thread of each rank writes, hashes and fsyncs its file, and when all ranks are through, all agree and
rank 0 adds the manifest and renames the folder. May touch: the checkpoints folder.

Ranks that were taken for dead, and wake up while others train in their place, can't put a checkpoint among those of
the others: they write into a folder of their own name, and the others' start has moved that away
(:func:`discard_unfinished`), or else their last look at the claim of the run folder comes after its change.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline import collectives
from pipeline.data.storage import fsync_folder, write_whole
from pipeline.training.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointError,
    CheckpointManifest,
    buffer_key,
    checkpoint_name,
    digest_file,
    find_damage,
    list_checkpoints,
    piece_key,
    rank_file,
    read_manifest,
)

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import Tensor

    from pipeline.training.average import WeightAverage
    from pipeline.training.run_lock import RunLock

logger = logging.getLogger("tessera")

ATTEMPTS = 3
"""How often :meth:`CheckpointWriter.save_and_wait` tries."""
WAIT_BETWEEN = 5.0
"""Seconds between its attempts: somebody may be making room."""
_PARTIAL, _REMOVED = ".partial-", ".removed-"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    newest: int
    every: int = 0
    """Those of every so many steps too; 0 for none."""
    best: bool = False
    """The one with the least loss too."""


@dataclass(frozen=True)
class _Flight:
    """A checkpoint that is being written."""

    step: int
    manifest: dict[str, Any]
    written: Future[tuple[str, tuple[int, str]]]


class CheckpointWriter:
    """Writes the checkpoints of one run; every rank has one and calls the same methods in the same order."""

    def __init__(
        self,
        folder: Path,
        retention: Retention,
        beside: Sequence[Path] = (),
        lock: RunLock | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        """``beside``: files of the run folder that each checkpoint gets a copy of. ``lock``: of the run folder; none
        where nobody else could write there. ``average``: of the weights, if there is one."""
        self._average = average
        self.folder = folder
        self._lock = lock
        self.retention = retention
        self._beside = beside
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tessera-checkpoint")
        self._flight: _Flight | None = None

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self._flight is not None and not self._flight.written.done()

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been begun that :meth:`commit` has not ended; the same on every rank."""
        return self._flight is not None

    def save(self, engine: DeepSpeedEngine, step: int, facts: Mapping[str, Any]) -> None:
        """Begin the checkpoint of ``step``; returns when the state is copied. ``facts`` are the manifest's fields that
        the engine does not know. Ends the one before first."""
        from pipeline.training.engine_state import buffers, optimizer_steps, owned_pieces, parameter_shapes

        if self.pending:
            self.commit()
        rank = collectives.rank()
        pieces = chain(owned_pieces(engine), self._average.pieces() if self._average else ())
        tensors = {piece_key(piece): _host_copy(piece.values) for piece in pieces}
        if rank == 0:
            tensors |= {buffer_key(name): _host_copy(value) for name, value in buffers(engine.module).items()}
        steps: dict[str, float] = {}
        for of_rank in collectives.all_gather_objects(optimizer_steps(engine)):
            steps |= of_rank
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": collectives.world_size(),
            "parameters": parameter_shapes(engine.module),
            "optimizer_steps": steps,
            **facts,
        }
        partial = self._partial(step)
        self._flight = _Flight(step, manifest, self._pool.submit(_write, partial / rank_file(rank), tensors))

    def commit(self) -> bool:
        """Wait for all ranks' files and make them a checkpoint. Returns False, on every rank, when one could not be
        written: then nothing of it is left, and it is in the log. Raises nothing for a full disk."""
        flight = self._flight
        assert flight is not None, "nothing was begun"
        self._flight = None
        answers = collectives.all_gather_objects(_outcome(flight.written))
        problems = [answer for answer in answers if isinstance(answer, str)]
        files = dict(answer for answer in answers if not isinstance(answer, str))
        problem = ""
        if collectives.rank() == 0:
            try:
                if problems:
                    raise OSError(problems[0])
                self._complete(flight, files)
            except OSError as error:
                problem = str(error)
                shutil.rmtree(self._partial(flight.step), ignore_errors=True)
        problem = collectives.all_gather_objects(problem)[0]
        if problem and collectives.rank() == 0:
            logger.warning("the checkpoint of step %d could not be written: %s", flight.step, problem)
        return not problem

    def save_and_wait(self, engine: DeepSpeedEngine, step: int, facts: Mapping[str, Any]) -> None:
        """The checkpoint of ``step``, whole on disk when this returns. Raises :class:`CheckpointError` when it can't be
        written in :data:`ATTEMPTS` attempts; the ones before it are untouched."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT_BETWEEN)
            self.save(engine, step, facts)
            if self.commit():
                return
        raise CheckpointError(
            f"the checkpoint of step {step} can't be written into {self.folder}: make room there and repeat the "
            "command; it goes on from the checkpoint before"
        )

    def close(self) -> None:
        """Stop writing; what was begun and not committed is left for the next start to clear away."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _partial(self, step: int) -> Path:
        return self.folder / f"{_PARTIAL}{self._lock.claim if self._lock else ''}-{checkpoint_name(step)}"

    def _complete(self, flight: _Flight, files: dict[str, tuple[int, str]]) -> None:
        partial, target = self._partial(flight.step), self.folder / checkpoint_name(flight.step)
        for source in self._beside:
            if source.is_file():
                shutil.copyfile(source, partial / source.name)
                files[source.name] = digest_file(partial / source.name)
        manifest = CheckpointManifest(files=files, **flight.manifest)
        write_whole(partial / MANIFEST, manifest.model_dump_json(indent=1).encode())
        if target.exists():  # the same step again, after a resume from an older checkpoint
            if find_damage(target) is None:
                shutil.rmtree(partial)
                return
            _remove(target)
        if self._lock is not None:
            self._lock.check()
        partial.rename(target)
        fsync_folder(self.folder)
        self._drop_old()

    def _drop_old(self) -> None:
        found = list_checkpoints(self.folder)
        kept = set(found[-self.retention.newest :])
        manifests = {}
        for checkpoint in found:
            try:
                manifests[checkpoint] = read_manifest(checkpoint)
            except CheckpointError as damage:
                logger.warning("%s", damage)
        if self.retention.every:
            kept |= {path for path, manifest in manifests.items() if manifest.step % self.retention.every == 0}
        losses = {path: manifest.loss for path, manifest in manifests.items() if manifest.loss is not None}
        if self.retention.best and losses:
            kept.add(min(losses, key=lambda path: losses[path]))
        for old in found:
            if old not in kept:
                _remove(old)


def discard_unfinished(folder: Path) -> None:
    """Remove what starts before this one left half-done. Called by the holder of the run folder before it looks for the
    last checkpoint: none of those can become one any more."""
    for leftover in (*folder.glob(f"{_REMOVED}*"), *folder.glob(f"{_PARTIAL}*")):
        with suppress(FileNotFoundError):
            _remove(leftover)


def _remove(folder: Path) -> None:
    """By its new name nobody takes it for a checkpoint, should a kill leave half of it, nor finishes it."""
    hidden = folder.with_name(f"{_REMOVED}{uuid4().hex}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _host_copy(values: Tensor) -> Tensor:
    """A copy that no later step changes."""
    return values.detach().to("cpu", copy=True).contiguous()


def _write(file: Path, tensors: dict[str, Tensor]) -> tuple[str, tuple[int, str]]:
    """Name, size and sha256 of a rank's file, written and fsynced."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # its words for an error of the file system
        raise OSError(f"{file}: {error}") from error
    digest = digest_file(file)
    fsync_folder(file.parent)
    return file.name, digest


def _outcome(written: Future[Any]) -> Any:
    """What a rank's thread gave, or its error as text."""
    try:
        return written.result()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        return f"rank {collectives.rank()}: {error.filename or ''} {reason}".replace("  ", " ")
