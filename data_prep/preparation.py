"""Preparation from end to end: scan, plan, write shards as Ray tasks, and finish with the manifest.

In: a source and settings. Out: a data set folder and a :class:`PreparationSummary`. Repeating the command after an
interruption does only what is missing, and the bytes are those of an uninterrupted run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import Literal

from data_prep.dispatch import Job, write_shards
from data_prep.failure import PreparationError, PreparationStopped, full_disk, is_full
from data_prep.lock import sole_workspace
from data_prep.progress import PreparationProgress, Tally, console_progress
from data_prep.shard import RECORD_FOLDER, Refusal, ShardRecord, finished_records
from data_prep.shard_plan import Settings, ShardTask, check_splits, parse_splits, plan_hash, plan_shards
from data_prep.source import scan
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.lengths import LENGTHS_NAME, stack_histograms, write_lengths
from pipeline.data.manifest import Manifest, SplitEntry, write_manifest
from pipeline.data.storage import as_place, open_folder

QUARANTINE_NAME = "quarantine.jsonl"
PLAN_NAME = "plan.json"
DEFAULT_SPLITS = "train=0.9,validation=0.1"
DEFAULT_SHARD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class PreparationSummary:
    """What a preparation made."""

    kind: str
    out: Path | str
    samples: int
    seconds: float  # of speech
    pixels: int  # of images
    bytes: int  # of all shards
    shards: int
    reused: int  # shards that an earlier run had finished
    splits: dict[str, int]  # samples in each
    refused: list[Refusal] = field(default_factory=list)
    ignored: int = 0  # files in the source that are of another kind
    elapsed_seconds: float = 0.0

    @property
    def hours(self) -> float:
        """Hours of speech."""
        return self.seconds / 3600

    def __str__(self) -> str:
        content = f"{self.samples} clips, {self.hours:.2f} h" if self.kind == "speech" else f"{self.samples} images"
        splits = ", ".join(f"{name} {samples}" for name, samples in self.splits.items())
        lines = [
            f"{self.out}: {content} in {self.shards} shards ({self.bytes / 1e6:.1f} MB; {splits}) "
            f"in {self.elapsed_seconds:.1f} s"
        ]
        if self.reused:
            lines.append(f"{self.reused} shards were finished before")
        if self.refused:
            lines.append(f"{len(self.refused)} files refused, see {open_folder(self.out).url(QUARANTINE_NAME)}:")
            lines += [f"  {refusal.path}: {refusal.reason}" for refusal in self.refused[:10]]
        return "\n".join(lines)


def prepare(
    kind: Literal["speech", "image"],
    source: str | Path,
    out: str | Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    splits: str | Mapping[str, float] = DEFAULT_SPLITS,
    split_by: Literal["file", "label"] = "file",
    on_bad: Literal["quarantine", "fail"] = "quarantine",
    workers: int | None = None,
    ray_address: str | None = None,
    seed: int = 0,
    check: Literal["full", "header"] = "full",
    max_seconds: float | None = None,
    image_size: int | None = None,
    image_format: Literal["keep", "jpeg"] = "keep",
    jpeg_quality: int = 95,
    colour: Literal["keep", "rgb", "grey"] = "keep",
    progress: Callable[[PreparationProgress], None] | None = None,
) -> PreparationSummary:
    """Make the data set ``out`` from ``source``: a folder, with tars in it or without, a .tar, or a text file with a
    path a line. Either may be a URL, such as ``s3://bucket/set``; every machine then needs the credentials.

    ``shard_bytes`` is the size to aim at; ``splits`` the shares, dealt by the hash of each key, with
    ``split_by="label"`` by speaker or class; ``workers`` how many shards are written at once (by default one a CPU of
    the Ray cluster). ``check="header"`` does not decode what is stored as it came. ``max_seconds``: longer recordings
    are cut at quiet places. ``image_size``: the shorter side that larger images are scaled to; ``image_format`` and
    ``colour``: what all images are to be; ``jpeg_quality``: of those that are encoded anew. ``progress`` replaces the
    bar on the console.

    Raises :class:`data_prep.source.SourceError` for a source that can't be read, ``ValueError`` for settings that
    mean nothing, :class:`PreparationError` if ``out`` holds something else or is being prepared, the disk is full, a
    shard can't be written, nothing usable was found, or ``on_bad="fail"`` met a bad file, ``ConnectionError`` if Ray is
    gone, and :class:`PreparationStopped`, a ``KeyboardInterrupt``, after Ctrl-C or SIGTERM.
    """
    began = time.monotonic()
    source, out = as_place(source), as_place(out)
    shares = parse_splits(splits) if isinstance(splits, str) else dict(splits)
    settings = Settings(
        kind,
        shard_bytes,
        tuple(shares.items()),
        split_by,
        seed,
        image_size,
        check,
        max_seconds,
        image_format,
        jpeg_quality,
        colour,
    )
    _refuse_meaningless(settings, on_bad)
    found = scan(kind, source, leave_out=out)
    tasks = plan_shards(found.files, settings)
    plan = plan_hash(tasks, settings)
    classes = sorted({file.label for file in found.files if file.label})
    records: dict[str, ShardRecord] = {}
    _refuse_foreign(out)
    try:
        with (
            _stop_in_order(),
            sole_workspace(_folder_here(out), out) as workspace,
        ):
            _claim(out, plan, source)
            places = {label: place for place, label in enumerate(classes)}
            job = Job(out if isinstance(out, str) else out.resolve(), workspace.resolve(), settings, places, plan)
            reused = _write_missing(job, tasks, records, on_bad, workers, ray_address, progress)
            manifest, refused = _finish(out, tasks, records, settings, classes)
    except KeyboardInterrupt as stop:
        raise PreparationStopped(
            f"stopped with {len(records)} of {len(tasks)} shards of {out} finished: the same command goes on from there"
        ) from stop
    except OSError as error:
        if not is_full(error):
            raise
        missing = [task for task in tasks if task.stem not in records]
        files, size = sum(len(task.files) for task in missing), sum(task.bytes for task in missing)
        raise full_disk(Path(gettempdir()) if isinstance(out, str) else out, error, files, size) from error
    return PreparationSummary(
        kind=kind,
        out=out,
        samples=manifest.samples,
        seconds=manifest.seconds,
        pixels=manifest.pixels,
        bytes=manifest.bytes,
        shards=len(manifest.shards()),
        reused=reused,
        splits={name: split.samples for name, split in manifest.splits.items()},
        refused=refused,
        ignored=found.ignored,
        elapsed_seconds=time.monotonic() - began,
    )


def _write_missing(
    job: Job,
    tasks: list[ShardTask],
    records: dict[str, ShardRecord],
    on_bad: str,
    workers: int | None,
    ray_address: str | None,
    progress: Callable[[PreparationProgress], None] | None,
) -> int:
    """Fill ``records`` with those of all ``tasks``, writing the shards that are missing; returns how many were
    there.
    """
    finished = finished_records(job.out, tasks, job.plan)
    there = [(task, finished[task.stem]) for task in tasks if task.stem in finished]
    for task, record in there:
        _check_refusals(record, on_bad)
        records[task.stem] = record
    missing = [task for task in tasks if task.stem not in records]
    with ExitStack() as stack:
        show = progress or stack.enter_context(console_progress(f"preparing {job.settings.kind}"))
        tally = Tally(job.settings.kind, tasks, there)
        show(tally.progress([]))
        # Closed at once when this loop ends early: an error would keep the generator, and Ray with it.
        turns = stack.enter_context(closing(write_shards(job, missing, workers, ray_address)))
        for turn in turns if missing else ():
            for task, record in turn.finished:
                records[task.stem] = record
                tally.add(task, record)
                _check_refusals(record, on_bad)
            show(tally.progress(turn.under_way))
    return len(there)


def _refuse_meaningless(settings: Settings, on_bad: str) -> None:
    """Raise ``ValueError`` for settings that mean nothing."""
    choices = {
        "kind": (settings.kind, ("speech", "image")),
        "split_by": (settings.split_by, ("file", "label")),
        "on_bad": (on_bad, ("quarantine", "fail")),
        "check": (settings.check, ("full", "header")),
        "image_format": (settings.image_format, ("keep", "jpeg")),
        "colour": (settings.colour, ("keep", "rgb", "grey")),
    }
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: use {' or '.join(allowed)}")
    if settings.shard_bytes < 1:
        raise ValueError(f"shard_bytes={settings.shard_bytes}: use a size in bytes, for example {DEFAULT_SHARD_BYTES}")
    kind, image_size, max_seconds = settings.kind, settings.image_size, settings.max_seconds
    if image_size is not None and (kind != "image" or image_size < 8):
        raise ValueError(f"image_size={image_size} with kind={kind}: it is for images, 8 pixels or more")
    if max_seconds is not None and (kind != "speech" or not 1 <= max_seconds < 1e6):
        raise ValueError(f"max_seconds={max_seconds:g} with kind={kind}: it is for speech, one second or more")
    if not 1 <= settings.jpeg_quality <= 100:
        raise ValueError(f"jpeg_quality={settings.jpeg_quality}: use a number from 1 to 100, such as 95")
    check_splits(dict(settings.splits))


def _folder_here(out: Path | str) -> Path:
    """Where to hold lock and workspace: the folder of records, or for a URL, which knows neither locks nor renaming,
    one for temporary files that is the same each time.
    """
    if isinstance(out, Path):
        return out / RECORD_FOLDER
    return Path(gettempdir()) / f"tessera-{os.getuid()}-{hashlib.sha256(out.rstrip('/').encode()).hexdigest()[:16]}"


def _refuse_foreign(out: Path | str) -> None:
    """Raise :class:`PreparationError` if ``out`` holds files that are not ours."""
    if isinstance(out, Path) and out.exists() and not out.is_dir():
        raise PreparationError(f"{out} is a file: give a folder for the data set")
    folder = open_folder(out)
    begun = folder.size(f"{RECORD_FOLDER}/{PLAN_NAME}") is not None
    if not begun and any(not file.name.startswith(f"{RECORD_FOLDER}/") for file in folder.files()):
        raise PreparationError(f"{out} holds files that no preparation made: give an empty or a new folder")


def _claim(out: Path | str, plan: str, source: Path | str) -> None:
    """Make ``out`` the folder of this plan, and clear what a killed driver left; refuse another plan's."""
    folder, claim = open_folder(out), f"{RECORD_FOLDER}/{PLAN_NAME}"
    try:
        claimed = json.loads(folder.read(claim)).get("plan")
    except FileNotFoundError:
        folder.write_whole(claim, json.dumps({"plan": plan}).encode())
        claimed = plan
    if claimed != plan:
        raise PreparationError(
            f"{out} holds a data set of other files or settings than these of {source} "
            "(a changed file counts as another): give another folder, or remove this one"
        )
    if isinstance(out, Path):  # a store takes files whole or not at all
        for leftover in (*out.glob("*.tmp-*"), *out.glob("*/*.tmp-*")):
            leftover.unlink(missing_ok=True)


@contextmanager
def _stop_in_order() -> Iterator[None]:
    """Turn SIGTERM, a scheduler's way to say stop, into what Ctrl-C is; only a main thread may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_refusals(record: ShardRecord, on_bad: str) -> None:
    if on_bad == "fail" and record.refused:
        first = record.refused[0]
        raise PreparationError(
            f"{first.path}: {first.reason}: repair or remove it, or set such files aside with --on-bad quarantine"
        )


def _finish(
    out: Path | str, tasks: list[ShardTask], records: dict[str, ShardRecord], settings: Settings, classes: list[str]
) -> tuple[Manifest, list[Refusal]]:
    """Write quarantine and manifest; the manifest comes last, and with it the data set exists."""
    refused = sorted((refusal for record in records.values() for refusal in record.refused), key=lambda each: each.path)
    lines = [json.dumps(refusal.model_dump(), ensure_ascii=False) + "\n" for refusal in refused]
    open_folder(out).write_whole(QUARANTINE_NAME, "".join(lines).encode())
    splits = {}
    for name, _ in settings.splits:
        splits[name] = _split_entry(out, name, [records[task.stem] for task in tasks if task.split == name])
    manifest = Manifest(
        kind=settings.kind,
        sample_rate=SAMPLE_RATE if settings.kind == "speech" else None,
        image_size=settings.image_size,
        classes=classes,
        seed=settings.seed,
        refused=len(refused),
        splits=splits,
    )
    if not manifest.samples:
        raise PreparationError(
            f"all {len(refused)} files were refused, the first because: {refused[0].reason} "
            f"(see {open_folder(out).url(QUARANTINE_NAME)})"
        )
    write_manifest(out, manifest)
    return manifest, refused


def _split_entry(out: Path | str, name: str, records: list[ShardRecord]) -> SplitEntry:
    """The split of these shards' records, its length histograms written."""
    entries = [record.entry for record in records if record.entry is not None]
    labels: Counter[str] = Counter()
    for record in records:
        labels.update(record.labels)
    histograms = [record.lengths for record in records if record.entry is not None and record.lengths]
    if not histograms:
        return SplitEntry.of(entries, labels=dict(sorted(labels.items())))
    file, table = f"{name}/{LENGTHS_NAME}", stack_histograms(histograms)
    return SplitEntry.of(
        entries,
        labels=dict(sorted(labels.items())),
        lengths=table.sum(axis=0, dtype=int).tolist(),
        lengths_file=file,
        lengths_sha256=write_lengths(open_folder(out), file, table),
    )
