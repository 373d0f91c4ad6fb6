"""The manifest of a prepared data set: what its shards hold and what their bytes must hash to.

In: ``OUT/manifest.json``. Out: a validated :class:`Manifest`, or a :class:`ManifestError` that says what to do. Reads
one file, and writes one, whole or not at all. Holds nothing that depends on the machine or the hour, so that equal
inputs give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.storage import is_remote, open_folder

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2  # 2: length histograms and label counts
PREPARE_NOUN = {"speech": "speech", "image": "images"}  # what `tessera prepare` calls a kind


class ManifestError(ValueError):
    """A data set folder that can't be used; the message names the path and what to do."""


class ShardEntry(BaseModel):
    """One shard: a tar of samples and, beside it, the index with the same stem."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(description="path of the tar, relative to the data set folder")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the tar")
    bytes: int = Field(ge=0, description="size of the tar")
    index_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the .idx beside it")
    samples: int = Field(ge=0, description="how many samples (clips or images)")
    seconds: float = Field(0.0, ge=0, description="speech: total duration")
    pixels: int = Field(0, ge=0, description="images: total width × height")

    @property
    def index_file(self) -> str:
        """Path of the index, relative to the data set folder."""
        return self.file.removesuffix(".tar") + ".idx"


class SplitEntry(BaseModel):
    """One split with its totals and its shards in order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int
    bytes: int
    seconds: float = 0.0
    pixels: int = 0
    labels: dict[str, int] = Field(default_factory=dict, description="samples of each class; unlabelled ones in none")
    lengths: list[int] = Field(default_factory=list, description="speech: clips by length, see pipeline.data.lengths")
    lengths_file: str | None = Field(None, description="speech: the same by shard, relative to the data set folder")
    lengths_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of lengths_file")
    shards: list[ShardEntry]

    @classmethod
    def of(
        cls,
        shards: list[ShardEntry],
        *,
        labels: dict[str, int] | None = None,
        lengths: list[int] | None = None,
        lengths_file: str | None = None,
        lengths_sha256: str | None = None,
    ) -> SplitEntry:
        """The split that these shards make, with their sums."""
        return cls(
            samples=sum(shard.samples for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            seconds=round(sum(shard.seconds for shard in shards), 6),
            pixels=sum(shard.pixels for shard in shards),
            labels=labels or {},
            lengths=lengths or [],
            lengths_file=lengths_file,
            lengths_sha256=lengths_sha256,
            shards=shards,
        )


class Manifest(BaseModel):
    """Everything a reader must know before it opens a shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = FORMAT_VERSION
    kind: Literal["speech", "image"]
    sample_rate: int | None = Field(None, description="speech: of every clip, in Hz")
    image_size: int | None = Field(None, description="images: shorter side after preparation; none means as it came")
    classes: list[str] = Field(default_factory=list, description="what label 0, 1, … is: a speaker or an image class")
    seed: int = Field(0, description="of the shuffle over shards")
    refused: int = Field(0, ge=0, description="source files in quarantine.jsonl")
    splits: dict[str, SplitEntry]

    @property
    def samples(self) -> int:
        return sum(split.samples for split in self.splits.values())

    @property
    def seconds(self) -> float:
        return sum(split.seconds for split in self.splits.values())

    @property
    def pixels(self) -> int:
        return sum(split.pixels for split in self.splits.values())

    @property
    def bytes(self) -> int:
        return sum(split.bytes for split in self.splits.values())

    def shards(self) -> list[ShardEntry]:
        """The shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    def to_json(self) -> str:
        """Canonical JSON text: equal manifests are equal bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def fingerprint(self, split: str | None = None) -> str:
        """16 hexadecimal digits that name the content of ``split``, or of all: what a reader gets, by its hashes."""
        digest = hashlib.sha256(f"{self.kind} {self.sample_rate} {self.image_size} {self.classes}\n".encode())
        for name in sorted(self.splits) if split is None else [split]:
            digest.update(f"{name}\n".encode())
            for shard in self.splits[name].shards:
                digest.update(f"{shard.samples} {shard.sha256} {shard.index_sha256}\n".encode())
        return digest.hexdigest()[:16]


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``folder/manifest.json``; the folder may be a URL.

    Raises :class:`ManifestError` if the folder or the manifest is missing, is not ours, or has a version this code
    can't read, and :class:`StoreError` if a remote store does not answer.
    """
    store = open_folder(folder)
    path = store.url(MANIFEST_NAME)
    remedy = f"prepare it with `tessera prepare speech SOURCE {folder}` or `tessera prepare images SOURCE {folder}`"
    if not is_remote(folder) and not Path(folder).is_dir():
        raise ManifestError(f"data set folder {folder} does not exist: {remedy}")
    try:
        values = json.loads(store.read(MANIFEST_NAME))
    except FileNotFoundError:
        raise ManifestError(
            f"{folder} holds no {MANIFEST_NAME} (not a data set, or its preparation was interrupted): {remedy}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path} is not JSON ({error}): {remedy}") from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ManifestError(
            f"{path} has format version {version!r}, this Tessera reads version {FORMAT_VERSION}: "
            "prepare the data set again, or use the Tessera that wrote it"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        raise ManifestError(f"{path}: {key}: {problem['msg']}: {remedy}") from error


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Write ``folder/manifest.json`` whole or not at all (design rule 7); the folder may be a URL."""
    open_folder(folder).write_whole(MANIFEST_NAME, manifest.to_json().encode())
