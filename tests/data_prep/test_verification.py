"""Verification finds each kind of damage, and nothing in a sound data set."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from data_prep import verify
from launch.cli import app
from pipeline.data import Manifest
from pipeline.data.index import ShardIndex, read_index
from pipeline.data.manifest import write_manifest
from pipeline.data.storage import open_folder


def test_a_sound_data_set_has_no_problems(speech_dataset: Path, image_dataset: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(speech_dataset, progress=lambda done, all_shards: seen.append((done, all_shards))) == []
    assert seen == [(number, len(seen)) for number in range(1, len(seen) + 1)]
    assert verify(image_dataset) == []


def flip_a_bit(folder: Path) -> None:
    path = folder / "train" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(folder: Path) -> None:
    path = folder / "train" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-5000])


def remove_shard(folder: Path) -> None:
    (folder / "train" / "shard-000001.tar").unlink()


def remove_index(folder: Path) -> None:
    (folder / "train" / "shard-000001.idx").unlink()


def swap_indexes(folder: Path) -> None:
    one, two = folder / "train" / "shard-000001.idx", folder / "train" / "shard-000002.idx"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def other_version(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(values | {"version": 9}))


def stray_shard(folder: Path) -> None:
    shutil.copy(folder / "train" / "shard-000001.tar", folder / "train" / "shard-000099.tar")


def wrong_totals(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    values["splits"]["train"]["samples"] += 1
    (folder / "manifest.json").write_text(json.dumps(values))


def wrong_labels(folder: Path) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    values["splits"]["train"]["labels"]["bridge"] += 1
    (folder / "manifest.json").write_text(json.dumps(values))


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def remove_quarantine(folder: Path) -> None:
    (folder / "quarantine.jsonl").unlink()


def shorten_quarantine(folder: Path) -> None:
    path = folder / "quarantine.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


def stray_file(folder: Path) -> None:
    (folder / "letter.txt").write_text("not ours")


def leave_a_manifest_half_written(folder: Path) -> None:
    (folder / "manifest.json.tmp-0123").write_text("{")


def leave_a_workspace(folder: Path) -> None:
    room = folder / ".prepare" / "writing-0123" / "4567"
    room.mkdir(parents=True)
    (room / "tar").write_bytes(b"half")


@pytest.mark.parametrize(
    ("damage", "file", "what"),
    [
        (flip_a_bit, "train/shard-000001.tar", "SHA-256"),
        (cut_short, "train/shard-000001.tar", "cut short"),
        (remove_shard, "train/shard-000001.tar", "is missing"),
        (remove_index, "train/shard-000001.idx", "is missing"),
        (swap_indexes, "train/shard-000002.idx", "SHA-256"),
        (other_version, "manifest.json", "format version 9"),
        (stray_shard, "train/shard-000099.tar", "not in the manifest"),
        (wrong_totals, "manifest.json", "totals of split train"),
        (wrong_labels, "manifest.json", "labels of split train"),
        (remove_manifest, "manifest.json", "holds no manifest.json"),
        (remove_quarantine, "quarantine.jsonl", "is missing"),
        (shorten_quarantine, "quarantine.jsonl", "lists 2 refused files, the manifest says 3"),
        (stray_file, "letter.txt", "not in the manifest"),
        (leave_a_manifest_half_written, "manifest.json.tmp-0123", "left over from an interrupted preparation"),
        (leave_a_workspace, ".prepare/writing-0123/4567/tar", "left over from an interrupted preparation"),
    ],
)
def test_damage_is_found_and_named(
    image_dataset: Path, tmp_path: Path, damage: Callable[[Path], None], file: str, what: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(image_dataset, copy)
    damage(copy)
    problems = verify(copy)
    assert any(problem.file == file and what in problem.what for problem in problems), problems
    untouched = "train/shard-000000"
    assert not any(problem.file.startswith(untouched) for problem in problems)


def test_any_flipped_bit_is_found(speech_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(speech_dataset, copy)
    paths = sorted(path for path in copy.rglob("*") if path.suffix in (".tar", ".idx", ".npy"))
    draw = random.Random(0)
    for _ in range(20):
        path = draw.choice(paths)
        with path.open("r+b") as file:
            place = draw.randrange(path.stat().st_size)
            file.seek(place)
            (byte,) = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
            file.flush()
            assert path.relative_to(copy).as_posix() in {problem.file for problem in verify(copy)}
            file.seek(place)
            file.write(bytes([byte]))
    assert verify(copy) == []


def test_the_command_tells_by_its_exit_code(image_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(image_dataset, copy)
    sound = CliRunner().invoke(app, ["verify", str(copy)])
    assert sound.exit_code == 0
    assert "every shard is as its manifest says" in sound.stdout
    flip_a_bit(copy)
    damaged = CliRunner().invoke(app, ["verify", str(copy)])
    assert damaged.exit_code == 1
    assert "train/shard-000001.tar: its SHA-256" in damaged.stderr
    assert "remove" in damaged.stderr


def test_damaged_length_histograms_are_found(speech_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(speech_dataset, copy)
    path = copy / "train" / "lengths.npy"
    table = np.load(path)
    table[2, [20, 21]] = table[2, [21, 20]] + 1
    np.save(path, table)
    (problem,) = verify(copy)
    assert problem.file == "train/lengths.npy"
    assert "SHA-256" in problem.what

    # Not damage but a wrong writer: the hash is right.
    manifest = Manifest.model_validate_json((copy / "manifest.json").read_bytes())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    split = manifest.splits["train"].model_copy(update={"lengths_sha256": sha256})
    write_manifest(copy, manifest.model_copy(update={"splits": manifest.splits | {"train": split}}))
    problems = [str(problem) for problem in verify(copy)]
    assert problems == [
        "manifest.json: the lengths of split train are not the sums of train/lengths.npy",
        "train/lengths.npy: counts the clips of train/shard-000002.tar by other lengths than its index",
    ]
    path.unlink()
    assert [str(problem) for problem in verify(copy)] == ["train/lengths.npy: is missing"]


def test_an_index_that_lies_is_found_though_its_hash_is_right(image_dataset: Path, tmp_path: Path) -> None:
    """Not damage but a wrong writer: manifest and index agree, the tar's own headers do not."""
    copy = tmp_path / "copy"
    shutil.copytree(image_dataset, copy)
    manifest = Manifest.model_validate_json((copy / "manifest.json").read_bytes())
    shards = list(manifest.splits["train"].shards)
    index = read_index(copy / shards[0].index_file)
    records = index.records.copy()
    records["offset"][3] += 512
    content = ShardIndex(records, index.keys).to_bytes()
    (copy / shards[0].index_file).write_bytes(content)
    shards[0] = shards[0].model_copy(update={"index_sha256": hashlib.sha256(content).hexdigest()})
    train = manifest.splits["train"].model_copy(update={"shards": shards})
    splits = manifest.splits | {"train": train}
    write_manifest(copy, manifest.model_copy(update={"splits": splits}))
    (problem,) = verify(copy)
    assert problem.file == shards[0].index_file
    assert f"sample {index.keys[3]} is not where the index says" in problem.what


def test_a_remote_data_set_is_verified_too(s3: str, image_dataset: Path, tmp_path: Path) -> None:
    store = open_folder(f"{s3}/{tmp_path.name}")
    for path in image_dataset.rglob("*"):
        if path.is_file() and ".prepare" not in path.parts:
            store.write_whole(path.relative_to(image_dataset).as_posix(), path.read_bytes())
    assert verify(str(store.place)) == []
    content = bytearray(store.read("train/shard-000001.tar"))
    content[len(content) // 2] ^= 1
    store.write_whole("train/shard-000001.tar", bytes(content))
    store.remove("train/shard-000002.tar")
    store.write_whole("train/mine.txt", b"")
    problems = [str(problem) for problem in verify(str(store.place))]
    assert len(problems) == 3
    assert problems[0].startswith("train/shard-000001.tar: its SHA-256 is")
    assert problems[1:] == ["train/shard-000002.tar: is missing", "train/mine.txt: is not in the manifest"]
    (problem,) = verify(f"{s3}/nowhere")
    assert f"{s3}/nowhere holds no manifest.json" in problem.what
