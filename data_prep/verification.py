"""The check of a finished data set against its manifest.

In: a data set folder, or its URL. Out: a list of :class:`Problem`, empty if all is well. Reads every byte of every
shard once; writes nothing there.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from data_prep.lock import WORKSPACE_PREFIX
from data_prep.preparation import QUARANTINE_NAME
from data_prep.shard import RECORD_FOLDER
from pipeline.data.index import ShardError, ShardIndex, read_index
from pipeline.data.lengths import LENGTHS_NAME, length_histogram, read_lengths
from pipeline.data.manifest import MANIFEST_NAME, Manifest, ManifestError, ShardEntry, SplitEntry, read_manifest
from pipeline.data.storage import Folder, LocalFolder, open_folder

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Problem:
    """Something that is off: which file, relative to the data set, and what."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def verify(
    dataset: str | Path, *, threads: int = 2, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Check manifest, hashes, indexes, members and quarantine of a data set, and that nothing else lies in it;
    ``progress(shards_done, shards)`` is called for each shard.

    A shard that was damaged is made again, with the same bytes, by removing it and repeating the preparation.
    """
    folder = open_folder(dataset)
    try:
        manifest = read_manifest(dataset)
    except ManifestError as error:
        return [Problem(MANIFEST_NAME, str(error))]
    problems: list[Problem] = []
    shards = manifest.shards()
    counts: list[ShardCounts | None] = []
    with ThreadPoolExecutor(threads) as pool:
        for done, (found, counted) in enumerate(pool.map(lambda shard: _look(folder, shard), shards), start=1):
            problems += found
            counts.append(counted)
            if progress is not None:
                progress(done, len(shards))
    first = 0
    for name, split in manifest.splits.items():
        of_split = counts[first : first + len(split.shards)]
        first += len(split.shards)
        problems += _check_split(folder, manifest, name, of_split)
    return [*problems, *_check_quarantine(folder, manifest), *_check_strays(folder, manifest)]


@contextmanager
def _here(folder: Folder, *names: str) -> Iterator[Path]:
    """The folder of this machine in which these files of a data set lie, if they exist; those behind a URL are copied
    for as long as it takes.
    """
    if isinstance(folder, LocalFolder):
        yield folder.place
        return
    with TemporaryDirectory(prefix="tessera-") as copies:
        for name in names:
            target = Path(copies) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.fetch(name, target)
            except FileNotFoundError:
                target.unlink(missing_ok=True)
        yield Path(copies)


def _look(folder: Folder, shard: ShardEntry) -> tuple[list[Problem], ShardCounts | None]:
    with _here(folder, shard.file, shard.index_file) as here:
        return _check_shard(here, shard)


def _check_quarantine(folder: Folder, manifest: Manifest) -> list[Problem]:
    try:
        listed = folder.read(QUARANTINE_NAME).count(b"\n")
    except FileNotFoundError:
        return [Problem(QUARANTINE_NAME, "is missing")]
    if listed != manifest.refused:
        return [Problem(QUARANTINE_NAME, f"lists {listed} refused files, the manifest says {manifest.refused}")]
    return []


def _check_strays(folder: Folder, manifest: Manifest) -> list[Problem]:
    """Files that the manifest does not know: left by an interrupted preparation, or put there by somebody."""
    known = {MANIFEST_NAME, QUARANTINE_NAME, *(split.lengths_file for split in manifest.splits.values())}
    known.update(name for shard in manifest.shards() for name in (shard.file, shard.index_file))
    problems = []
    for name in sorted(file.name for file in folder.files()):
        ours = name.startswith(f"{RECORD_FOLDER}/")
        if ".tmp-" in name or (ours and WORKSPACE_PREFIX in name):
            problems.append(Problem(name, "is left over from an interrupted preparation: repeat that, or remove it"))
        elif not ours and name not in known and not name.startswith("."):
            problems.append(Problem(name, "is not in the manifest"))
    return problems


class ShardCounts(NamedTuple):
    """What a shard's index counts, for the split's sums."""

    lengths: np.ndarray  # clips by bin
    labels: Counter[int]  # samples by place in the manifest's classes


def _check_split(folder: Folder, manifest: Manifest, name: str, counts: list[ShardCounts | None]) -> list[Problem]:
    """Compare a split's sums with its shards, and its length histograms with the indexes that could be read."""
    split = manifest.splits[name]
    problems = []
    sums = SplitEntry.of(split.shards)
    if any(getattr(split, total) != getattr(sums, total) for total in ("samples", "bytes", "seconds", "pixels")):
        problems.append(Problem(MANIFEST_NAME, f"the totals of split {name} are not the sums of its shards"))
    whole = all(each is not None for each in counts)  # or the broken shard is told of, and no sum can be right
    labels: Counter[int] = Counter()
    for each in counts:
        labels.update(each.labels if each is not None else ())
    names = dict(enumerate(manifest.classes))
    named = {names.get(label, f"class {label}"): samples for label, samples in labels.items() if label >= 0}
    if whole and named != split.labels:
        problems.append(Problem(MANIFEST_NAME, f"the labels of split {name} are not counted as in its indexes"))
    if manifest.kind != "speech" or not split.shards:
        return problems
    lengths_file = split.lengths_file or f"{name}/{LENGTHS_NAME}"
    with _here(folder, lengths_file) as here:
        found = _check_bytes(here, lengths_file, split.lengths_sha256 or "", None)
        if found:
            return problems + found
        try:
            table = read_lengths(here, split)
        except ManifestError as error:
            return [*problems, Problem(lengths_file, str(error))]
    if table.sum(axis=0, dtype=int).tolist() != split.lengths:
        problems.append(Problem(MANIFEST_NAME, f"the lengths of split {name} are not the sums of {lengths_file}"))
    for shard, row, each in zip(split.shards, table, counts, strict=True):
        if each is not None and np.trim_zeros(row, "b").tolist() != each.lengths.tolist():
            problems.append(Problem(lengths_file, f"counts the clips of {shard.file} by other lengths than its index"))
    return problems


def _check_shard(folder: Path, shard: ShardEntry) -> tuple[list[Problem], ShardCounts | None]:
    """The shard's problems, and its counts if its index could be read."""
    problems = _check_bytes(folder, shard.file, shard.sha256, shard.bytes)
    index_problems = _check_bytes(folder, shard.index_file, shard.index_sha256, None)
    problems += index_problems
    try:
        index = read_index(folder / shard.index_file)
    except ShardError as error:
        return problems or [Problem(shard.index_file, str(error))], None
    if (folder / shard.file).is_file():
        problems += _check_members(folder, shard, index)
    lengths, labels = index.records["length"], index.records["label"]
    counts = ShardCounts(length_histogram(lengths), Counter(labels.tolist()))
    return problems, None if index_problems else counts


def _check_bytes(folder: Path, name: str, sha256: str, size: int | None) -> list[Problem]:
    path = folder / name
    if not path.is_file():
        return [Problem(name, "is missing")]
    actual = path.stat().st_size
    if size is not None and actual != size:
        return [Problem(name, f"has {actual} bytes, the manifest says {size}: it was cut short or grew")]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    if digest.hexdigest() != sha256:
        return [Problem(name, f"its SHA-256 is {digest.hexdigest()[:12]}…, the manifest says {sha256[:12]}…")]
    return []


def _check_members(folder: Path, shard: ShardEntry, index: ShardIndex) -> list[Problem]:
    """Compare the index with the tar's own headers."""
    if len(index.keys) != shard.samples:
        return [Problem(shard.index_file, f"lists {len(index.keys)} samples, the manifest says {shard.samples}")]
    members: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(folder / shard.file, mode="r:") as archive:
            for member in archive:
                members[member.name] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        return [Problem(shard.file, f"is not a whole tar: {error}")]
    places = {place: name for name, place in members.items()}
    for key, record in zip(index.keys, index.records, strict=True):
        media = places.get((int(record["offset"]), int(record["size"])), "")
        metadata = places.get((int(record["json_offset"]), int(record["json_size"])), "")
        if media.rpartition(".")[0] != key or metadata != f"{key}.json":
            return [Problem(shard.index_file, f"sample {key} is not where the index says")]
    if len(members) != 2 * shard.samples:
        return [Problem(shard.file, f"holds {len(members)} members, {2 * shard.samples} belong to its samples")]
    return []
