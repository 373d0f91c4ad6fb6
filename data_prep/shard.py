"""One shard: check its files, write tar and index, and leave a record that it is done.

In: a :class:`ShardTask`. Out: a :class:`ShardRecord`. Writes ``<split>/shard-000000.tar`` and ``.idx`` whole or not
at all (design rule 7), then the record below ``.prepare``. Equal tasks give equal bytes: USTAR headers with fixed
owner and time 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.check import CheckedSample, Refused, check_file
from data_prep.probe import crash_of
from data_prep.shard_plan import Settings, ShardTask
from data_prep.source import SourceFile, read_ahead
from data_prep.tar import HashedTar
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.index import RECORD, ShardIndex
from pipeline.data.lengths import length_histogram
from pipeline.data.manifest import ShardEntry
from pipeline.data.storage import Folder, is_remote, open_folder, write_whole

RECORD_FOLDER = ".prepare"
_CONNECTIONS = 16  # to a remote data set at a time
_AS_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


class Refusal(BaseModel):
    """A source file that was left out, as it stands in quarantine.jsonl."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str  # within the source
    reason: str
    bytes: int


class ShardRecord(BaseModel):
    """That a shard is complete, and what came of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    entry: ShardEntry | None  # None if all its files were refused: then there is no tar
    index_bytes: int
    refused: list[Refusal]
    lengths: list[int]  # speech: clips by length, see pipeline.data.lengths
    labels: dict[str, int]  # samples of each class


def record_name(task: ShardTask) -> str:
    """Where a shard's record lies in the data set."""
    return f"{RECORD_FOLDER}/{task.stem}.json"


def finished_record(out: str | Path, task: ShardTask, plan: str) -> ShardRecord | None:
    """The record of a shard that this preparation has completed, or None if it is to be written."""
    folder = open_folder(out)
    return _whole_record(folder, task, plan, folder.size)


def finished_records(out: str | Path, tasks: Sequence[ShardTask], plan: str) -> dict[str, ShardRecord]:
    """The same of all ``tasks``, by stem; the folder is listed once."""
    folder = open_folder(out)
    sizes = {file.name: file.size for file in folder.files()}
    begun = [task for task in tasks if record_name(task) in sizes]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        records = pool.map(lambda task: _whole_record(folder, task, plan, sizes.get), begun)
        return {task.stem: record for task, record in zip(begun, records, strict=True) if record is not None}


def _whole_record(
    folder: Folder, task: ShardTask, plan: str, size_of: Callable[[str], int | None]
) -> ShardRecord | None:
    try:
        record = ShardRecord.model_validate_json(folder.read(record_name(task)))
    except (OSError, ValidationError):
        return None
    if record.plan != plan:
        return None
    if record.entry is not None:
        for name, size in ((record.entry.file, record.entry.bytes), (record.entry.index_file, record.index_bytes)):
            if size_of(name) != size:
                return None
    return record


def write_shard(
    out: str | Path,
    workspace: Path,
    task: ShardTask,
    settings: Settings,
    classes: dict[str, int],
    plan: str,
    report: Callable[[int], None] = lambda place: None,
    suspects: Collection[int] = (),
) -> ShardRecord:
    """Check the files of ``task`` and write its shard; files that are refused shift nothing but what stands behind
    them.

    Everything is written in a folder of its own below ``workspace``, which must exist on ``out``'s file system, and
    renamed from there: once a later preparation has removed the workspace, a worker that outlived its driver can
    publish nothing more. To a URL everything is uploaded from there, the record last; an orphan's uploads are those of
    its plan, byte for byte. ``report(place)`` is called before each file of the task, and at the end with their number.
    At the places ``suspects`` a worker has died: those files are first decoded in a process of their own.
    """
    room = workspace / uuid4().hex
    room.mkdir()
    try:
        return _write_in(room, open_folder(out), task, settings, classes, plan, report, suspects)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _write_in(
    room: Path,
    out: Folder,
    task: ShardTask,
    settings: Settings,
    classes: dict[str, int],
    plan: str,
    report: Callable[[int], None],
    suspects: Collection[int],
) -> ShardRecord:
    tar, index_file, record_file = room / "tar", room / "idx", room / "json"
    records: list[tuple[int, ...]] = []
    keys: list[str] = []
    refused: list[Refusal] = []
    labels: Counter[str] = Counter()
    with tar.open("xb") as file:
        archive = HashedTar(file)
        for place, (source, read) in enumerate(zip(task.files, read_ahead(task.files), strict=True)):
            report(place)
            try:
                samples = _checked(source, read, settings, place in suspects)
            except Refused as error:
                refused.append(Refusal(path=source.name, reason=str(error), bytes=source.size))
                continue
            for sample in samples:
                key = source.key if sample.piece is None else f"{source.key}~{sample.piece:06d}"
                metadata = describe(source, sample)
                offset, json_offset = archive.add(
                    [(f"{key}.{sample.suffix}", sample.content), (f"{key}.json", metadata)]
                )
                label = classes.get(source.label, -1)
                sizes = (offset, len(sample.content), json_offset, len(metadata))
                records.append((*sizes, sample.length, sample.width, sample.height, label))
                keys.append(key)
                if source.label:
                    labels[source.label] += 1
        archive.finish()
        file.flush()
        os.fsync(file.fileno())
    entry, index_bytes = None, 0
    lengths = [record[4] for record in records]
    if keys:
        index = ShardIndex(np.array(records, dtype=RECORD), keys).to_bytes()
        length = sum(lengths)
        entry = ShardEntry(
            file=f"{task.stem}.tar",
            sha256=archive.sha256.hexdigest(),
            bytes=archive.size,
            index_sha256=hashlib.sha256(index).hexdigest(),
            samples=len(keys),
            seconds=round(length / SAMPLE_RATE, 6) if settings.kind == "speech" else 0.0,
            pixels=length if settings.kind == "image" else 0,
        )
        index_bytes = len(index)
        write_whole(index_file, index)
        out.publish(index_file, entry.index_file)
        out.publish(tar, entry.file)
    record = ShardRecord(
        plan=plan,
        entry=entry,
        index_bytes=index_bytes,
        refused=refused,
        lengths=length_histogram(np.array(lengths)).tolist() if settings.kind == "speech" else [],
        labels=dict(sorted(labels.items())),
    )
    write_whole(record_file, record.model_dump_json().encode())
    out.publish(record_file, record_name(task))  # the last: with it the shard counts as done
    report(len(task.files))
    return record


def _checked(source: SourceFile, read: Callable[[], bytes], settings: Settings, suspect: bool) -> list[CheckedSample]:
    """What a shard stores of a file; raises :class:`Refused`."""
    try:
        content = read()
    except (FileNotFoundError, PermissionError) as error:  # other errors of the disk are tried again
        if source.modified and not is_remote(source.path) and not Path(source.path).parent.is_dir():
            raise  # the scan has seen it: this machine does not see the source, and no file is to blame
        raise Refused(f"can't be read: {error.strerror}") from error
    if suspect and (crash := crash_of(content, settings)) is not None:
        raise Refused(f"kills the process that decodes it ({crash})")
    return check_file(content, settings)


def describe(source: SourceFile, sample: CheckedSample) -> bytes:
    """KEY.json: where the sample came from and what it is."""
    text = source.text if sample.piece is None else ""  # of the whole recording, and not of a piece
    values = {"source": source.name, "label": source.label, "text": text} | sample.metadata
    kept = {name: value for name, value in values.items() if value != ""}
    return _AS_JSON(kept).encode()
