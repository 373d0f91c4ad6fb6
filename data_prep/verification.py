"""The check of a finished data set against its manifest.

In: a data set folder. Out: a list of :class:`Problem`, empty if all is well. Reads every byte of every shard once;
writes nothing.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.index import ShardError, ShardIndex, read_index
from pipeline.data.manifest import MANIFEST_NAME, ManifestError, ShardEntry, SplitEntry, read_manifest

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
    """Check manifest, hashes, indexes and members of a data set; ``progress(shards_done, shards)`` is called for each
    shard.
    """
    folder = Path(dataset)
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return [Problem(MANIFEST_NAME, str(error))]
    problems: list[Problem] = []
    for name, split in manifest.splits.items():
        if split != SplitEntry.of(split.shards):
            problems.append(Problem(MANIFEST_NAME, f"the totals of split {name} are not the sums of its shards"))
    shards = manifest.shards()
    with ThreadPoolExecutor(threads) as pool:
        for done, found in enumerate(pool.map(lambda shard: _check_shard(folder, shard), shards), start=1):
            problems += found
            if progress is not None:
                progress(done, len(shards))
    known = {name for shard in shards for name in (shard.file, shard.index_file)}
    for split_name in manifest.splits:
        for path in sorted((folder / split_name).glob("*")):
            place = path.relative_to(folder).as_posix()
            if place not in known:
                problems.append(Problem(place, "is not in the manifest"))
    return problems


def _check_shard(folder: Path, shard: ShardEntry) -> list[Problem]:
    problems = [
        *_check_bytes(folder, shard.file, shard.sha256, shard.bytes),
        *_check_bytes(folder, shard.index_file, shard.index_sha256, None),
    ]
    if (folder / shard.file).is_file():
        try:
            index = read_index(folder / shard.index_file)
        except ShardError as error:
            return problems or [Problem(shard.index_file, str(error))]
        problems += _check_members(folder, shard, index)
    return problems


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
