"""Which files go into which shard: decided before the first is opened, so that it depends on nothing that happens
later.

In: the scanned files and the settings. Out: one :class:`ShardTask` a shard. Pure.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass

from data_prep.source import SourceFile

# Raised when shards made from the same files and settings would have other bytes than before.
LAYOUT_VERSION = 2


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of a data set, beside the source's files."""

    kind: str
    shard_bytes: int
    splits: tuple[tuple[str, float], ...]
    split_by: str  # "file", or "label" to keep a speaker in one split
    seed: int
    image_size: int | None = None  # the shorter side that larger images are scaled to, in pixels
    check: str = "full"  # or "header": files that are stored as they came are not decoded
    max_seconds: float | None = None  # longer recordings are cut into pieces of at most so many
    image_format: str = "keep"  # or "jpeg"
    jpeg_quality: int = 95  # of what is encoded anew
    colour: str = "keep"  # or "rgb", "grey"


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    split: str
    number: int
    files: list[SourceFile]

    @property
    def stem(self) -> str:
        """Path without suffix, relative to the data set folder."""
        return f"{self.split}/shard-{self.number:06d}"

    @property
    def bytes(self) -> int:
        """Size of the source files."""
        return sum(file.size for file in self.files)


def parse_splits(text: str) -> dict[str, float]:
    """``"train=0.9,validation=0.1"`` → shares; a single name takes everything. Raises ``ValueError`` saying what is
    wrong.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, share = part.strip().partition("=")
        if not name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"split {part.strip()!r} has no usable name: write for example train=0.9,validation=0.1")
        if name in shares:
            raise ValueError(f"split {name!r} is named twice in {text!r}")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError:
            raise ValueError(f"split {name!r} has the share {share!r}: use a number between 0 and 1") from None
    check_splits(shares)
    return shares


def check_splits(shares: dict[str, float]) -> None:
    """Raise ``ValueError`` unless the shares are positive and sum to 1."""
    total = sum(shares.values())
    if not shares or any(share <= 0 for share in shares.values()) or abs(total - 1) > 1e-6:
        written = ",".join(f"{name}={share:g}" for name, share in shares.items())
        raise ValueError(f"split shares must be above 0 and sum to 1, {written or 'none'} sums to {total:g}")


def plan_shards(files: list[SourceFile], settings: Settings) -> list[ShardTask]:
    """Deal the files to splits by the hash of their key, shuffle each split by seed, and cut it into shards of equal
    bytes.

    A file's split and its place among the others depend on its own key and the seed, not on which files stand beside
    it.
    """
    members: dict[str, list[tuple[bytes, SourceFile]]] = {name: [] for name, _ in settings.splits}
    for file in files:
        members[_split_of(file, settings)].append((_hash(f"order {settings.seed} {file.key}"), file))
    tasks: list[ShardTask] = []
    for split, drawn in members.items():
        drawn.sort(key=lambda pair: pair[0])
        # Empty files weigh something too, or a shard could get any number of them.
        weights = [max(file.size, 512) for _, file in drawn]
        shards = max(1, math.ceil(sum(weights) / settings.shard_bytes))
        cut: list[list[SourceFile]] = [[] for _ in range(shards)]
        passed = 0.0
        for (_, file), weight in zip(drawn, weights, strict=True):
            middle = passed + weight / 2
            cut[min(shards - 1, int(middle * shards / sum(weights)))].append(file)
            passed += weight
        filled = [shard for shard in cut if shard]
        tasks.extend(ShardTask(split, number, shard) for number, shard in enumerate(filled))
    return tasks


def plan_hash(tasks: list[ShardTask], settings: Settings) -> str:
    """Names a preparation: the same files, unchanged, and the same settings."""
    digest = hashlib.sha256(json.dumps([LAYOUT_VERSION, asdict(settings)]).encode())
    for task in tasks:
        digest.update(task.stem.encode())
        for file in task.files:
            digest.update(f"{file.key}\n{file.name}\n{file.size}\n{file.modified}\n{file.text}\n".encode())
    return digest.hexdigest()[:16]


def _split_of(file: SourceFile, settings: Settings) -> str:
    unit = file.label if settings.split_by == "label" and file.label else file.key
    place = int.from_bytes(_hash(f"split {settings.seed} {unit}")[:8], "little") / 2**64
    reached = 0.0
    for name, share in settings.splits:
        reached += share
        if place < reached:
            return name
    return settings.splits[-1][0]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
