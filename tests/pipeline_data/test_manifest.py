"""Manifests: what is written is read, and what can't be used is refused with the path and a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data import Manifest, ManifestError, ShardedDataset, read_manifest
from pipeline.data.manifest import ShardEntry, SplitEntry, write_manifest

SHARD = ShardEntry(
    file="train/shard-000000.tar", sha256="a" * 64, bytes=10_240, index_sha256="b" * 64, samples=3, seconds=4.5
)
SPLIT = SplitEntry.of(
    [SHARD], labels={"ann": 2}, lengths=[0] * 10 + [1, 2], lengths_file="train/lengths.npy", lengths_sha256="d" * 64
)
MANIFEST = Manifest(kind="speech", sample_rate=16_000, classes=["ann"], splits={"train": SPLIT})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert MANIFEST.seconds == 4.5
    assert MANIFEST.splits["train"].shards[0].index_file == "train/shard-000000.idx"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_fingerprint_names_content_and_split() -> None:
    again = Manifest.model_validate(MANIFEST.model_dump())
    assert again.fingerprint("train") == MANIFEST.fingerprint("train")
    other = SHARD.model_copy(update={"sha256": "c" * 64})
    two = MANIFEST.model_copy(update={"splits": {"train": SPLIT, "validation": SplitEntry.of([other])}})
    assert two.fingerprint("validation") != two.fingerprint("train")
    assert two.fingerprint() not in (two.fingerprint("validation"), two.fingerprint("train"))
    assert two.fingerprint("train") == MANIFEST.fingerprint("train"), "another split is another thing"
    changed = MANIFEST.model_copy(update={"splits": {"train": SplitEntry.of([other])}})
    assert changed.fingerprint("train") != MANIFEST.fingerprint("train")


def test_a_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ManifestError, match=rf"{missing} does not exist.*tessera prepare speech SOURCE {missing}"):
        ShardedDataset(missing)


def test_a_folder_without_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"holds no manifest.json.*tessera prepare"):
        read_manifest(tmp_path)


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    values = MANIFEST.model_dump(mode="json") | {"version": 9, "a field of the future": 1}
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(
        ManifestError, match="format version 9, this Tessera reads version 2: prepare the data set again"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [("{", "is not JSON"), ("[]", "format version None"), ('{"version": 2, "kind": "smell", "splits": {}}', "kind")],
)
def test_damaged_manifests_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ManifestError, match=says):
        read_manifest(tmp_path)
