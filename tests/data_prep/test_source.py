"""The scan: trees, tars and lists give the same files, with keys that WebDataset and USTAR accept."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data_prep.source import Scan, SourceError, read_ahead, scan
from pipeline.data.storage import open_folder


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    write(root / "ann" / "1" / "ann-1-0.flac", b"first")
    write(root / "ann" / "1" / "ann-1-1.FLAC", b"second")
    write(root / "ann" / "1" / "ann-1.trans.txt", b"ann-1-0 HELLO WORLD\nann-1-1 \xc3\x89T\xc3\x89\n")
    write(root / "bob" / "2" / "bob.2.wav", b"third")
    write(root / "notes.pdf")
    write(root / ".hidden" / "secret.wav")
    return root


def test_a_tree_gives_names_labels_and_transcripts(tree: Path, tmp_path: Path) -> None:
    found = scan("speech", tree, tmp_path / "out")
    assert [(file.key, file.label, file.text) for file in found.files] == [
        ("ann/1/ann-1-0", "ann", "HELLO WORLD"),
        ("ann/1/ann-1-1", "ann", "ÉTÉ"),
        ("bob/2/bob_2", "bob", ""),
    ]
    assert [file.read() for file in found.files] == [b"first", b"second", b"third"]
    assert found.ignored == 2


def test_a_tar_gives_the_same_as_its_tree(tree: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tree.tar", "w") as archive:
        archive.add(tree / "bob", "bob")
        archive.add(tree / "ann", "ann")
    of_tar = scan("speech", tmp_path / "tree.tar", tmp_path / "out").files
    of_tree = scan("speech", tree, tmp_path / "out").files
    assert [(file.key, file.label, file.text) for file in of_tar] == [
        (file.key, file.label, file.text) for file in of_tree
    ]
    assert [file.read() for file in of_tar] == [b"first", b"second", b"third"]


def test_a_list_gives_its_files_with_their_labels(tree: Path, tmp_path: Path) -> None:
    listing = tmp_path / "list.txt"
    listing.write_text("tree/bob/2/bob.2.wav\tBobby\n\ntree/ann/1/ann-1-0.flac\nmissing.wav\n")
    files = scan("speech", listing, tmp_path / "out").files
    assert [(file.name, file.label) for file in files] == [
        ("missing.wav", ""),
        ("tree/ann/1/ann-1-0.flac", "ann"),
        ("tree/bob/2/bob.2.wav", "Bobby"),
    ]
    assert files[2].read() == b"third"


def test_keys_are_unique_short_and_without_dots(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    write(root / "a.b.jpg")
    write(root / "a.b.png")
    write(root / "a_b.jpg")
    write(root / f"{'long' * 40}.jpg")
    write(root / f"{'é' * 80}" / "und ß.jpg")
    keys = [file.key for file in scan("image", root, tmp_path / "out").files]
    assert len(set(keys)) == 5
    assert all(len(key.encode()) <= 90 and "." not in key and " " not in key for key in keys)
    assert keys == [file.key for file in scan("image", root, tmp_path / "out").files]


def test_links_are_followed_once_and_the_output_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    write(root / "class" / "one.jpg")
    write(tmp_path / "elsewhere" / "two.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "class" / "round").symlink_to(root)
    write(root / "out" / "three.jpg")
    assert [file.name for file in scan("image", root, root / "out").files] == ["class/one.jpg", "linked/two.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere", None, "does not exist"),
        ("set.tar.gz", b"", "is packed"),
        ("set.tar", b"no tar", "is not a readable tar"),
        ("set.bin", b"\xff\xfe\x00\x81", "neither a folder"),
        ("empty.txt", b"", "holds no speech files"),
    ],
)
def test_sources_that_can_not_be_read_are_named(tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=f"{name} .*{says}"):
        scan("speech", tmp_path / name, tmp_path / "out")


def make_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return path


def facts(found: Scan) -> list[tuple[str, str, str, bytes]]:
    return [(file.key, file.label, file.text, file.read()) for file in found.files]


WEBDATASET = {
    "000.jpg": b"zero",
    "000.cls": b"7\n",
    "000.txt": "Œuvre".encode(),
    "001.json": json.dumps({"label": "dog", "caption": "a dog", "width": 3}).encode(),
    "001.jpg": b"one",
    "002.jpg": b"two",
    "002.json": b"no json",
    "003.left.jpg": b"three",
    "003.json": b'{"class": 4}',
}


def test_the_small_members_beside_a_webdataset_sample_tell_of_it(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", WEBDATASET)
    found = scan("image", tmp_path / "a.tar", tmp_path / "out")
    assert facts(found) == [
        ("000", "7", "Œuvre", b"zero"),
        ("001", "dog", "a dog", b"one"),
        ("002", "", "", b"two"),
        ("003_left", "4", "", b"three"),
    ]
    assert found.ignored == 5


def test_tars_in_a_folder_or_a_list_are_opened(tmp_path: Path) -> None:
    make_tar(tmp_path / "tars" / "train-000.tar", WEBDATASET)
    make_tar(tmp_path / "tars" / "more" / "train-001.tar", {"cat/000.jpg": b"cat", "./000.jpg": b"none"})
    write(tmp_path / "tars" / "bird" / "000.jpg", b"bird")
    of_tree = facts(scan("image", tmp_path / "tars", tmp_path / "out"))
    assert [(key, label, content) for key, label, _, content in of_tree] == [
        ("bird/000", "bird", b"bird"),
        ("more/train-001/000", "", b"none"),
        ("more/train-001/cat/000", "cat", b"cat"),
        ("train-000/000", "7", b"zero"),
        ("train-000/001", "dog", b"one"),
        ("train-000/002", "", b"two"),
        ("train-000/003_left", "4", b"three"),
    ]
    (tmp_path / "tars.txt").write_text("tars/train-000.tar\ntars/more/train-001.tar\tpets\n")
    of_list = scan("image", tmp_path / "tars.txt", tmp_path / "out").files
    assert [(file.name, file.label) for file in of_list[:2]] == [
        ("tars/more/train-001/000.jpg", "pets"),
        ("tars/more/train-001/cat/000.jpg", "pets"),
    ]


def test_names_that_are_no_utf_8_are_shown_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / os.fsdecode(b"caf\xe9.wav")).write_bytes(b"x")
    (file,) = scan("speech", tmp_path / "tree", tmp_path / "out").files
    assert (file.name, file.key, file.read()) == ("caf\\xe9.wav", "caf_xe9", b"x")


@pytest.fixture
def remote(s3: str, tree: Path, tmp_path: Path) -> str:
    """The tree, a tar of it and a list of two of its files, on the S3 server."""
    folder = open_folder(f"{s3}/{tmp_path.name}")
    for path in tree.rglob("*"):
        if path.is_file():
            folder.write_whole(f"tree/{path.relative_to(tree).as_posix()}", path.read_bytes())
    with tarfile.open(tmp_path / "tree.tar", "w") as archive:
        for speaker in ("ann", "bob"):
            archive.add(tree / speaker, speaker)
    folder.publish(tmp_path / "tree.tar", "tree.tar")
    lines = f"tree/bob/2/bob.2.wav\tBobby\n{folder.url('tree/ann/1/ann-1-0.flac')}\ntree/missing.wav\n"
    folder.write_whole("some.txt", lines.encode())
    return str(folder.place)


def test_a_remote_source_gives_the_same_as_one_here(remote: str, tree: Path, tmp_path: Path) -> None:
    here = facts(scan("speech", tree, tmp_path / "out"))
    of_tree, of_tar = scan("speech", f"{remote}/tree", f"{remote}/tree/out"), scan("speech", f"{remote}/tree.tar", "")
    assert facts(of_tree) == facts(of_tar) == here
    assert of_tree.files == scan("speech", f"{remote}/tree", "").files
    of_list = scan("speech", f"{remote}/some.txt", "").files
    bucket = remote.partition("://")[2]
    assert [(file.name, file.label, file.size) for file in of_list] == [
        (f"{bucket}/tree/ann/1/ann-1-0.flac", "ann", 5),
        ("tree/bob/2/bob.2.wav", "Bobby", 5),
        ("tree/missing.wav", "tree", 0),
    ]
    assert [read() for read in read_ahead(of_list[:2])] == [b"first", b"third"]


def test_a_changed_remote_file_is_another(remote: str) -> None:
    before = scan("speech", f"{remote}/tree", "").files
    open_folder(remote).write_whole("tree/bob/2/bob.2.wav", b"thiRd")
    after = scan("speech", f"{remote}/tree", "").files
    assert [old.key for old, new in zip(before, after, strict=True) if old != new] == ["bob/2/bob_2"]


def test_what_lies_in_the_remote_output_is_left_out(remote: str) -> None:
    assert [file.key for file in scan("speech", f"{remote}/tree", f"{remote}/tree/ann").files] == ["bob/2/bob_2"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "does not exist or is empty: use the URL of a folder"),
        ("nowhere.tar", "does not exist"),
        ("nowhere.txt", "does not exist"),
        ("tree.tar.gz", "is packed"),
    ],
)
def test_remote_sources_that_can_not_be_read_are_named(s3: str, name: str, says: str) -> None:
    with pytest.raises(SourceError, match=f"source {s3}/{name} {says}"):
        scan("speech", f"{s3}/{name}", "")


def test_a_web_server_is_a_source_too(tree: Path, tmp_path: Path) -> None:
    """Python's own, whose pages list what its folders hold, and which sends whole files only."""
    (tree / "bob").rename(tree / "bö b")
    (tmp_path / "some.txt").write_text("tree/bö b/2/bob.2.wav\tBobby\ntree/nothing.wav\n")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().partition("(")[2].partition("/)")[0]
        found = scan("speech", f"{url}/tree", "")
        assert facts(found) == facts(scan("speech", tree, tmp_path / "out"))
        assert all(file.size for file in found.files)
        assert [(file.name, file.label, file.size) for file in scan("speech", f"{url}/some.txt", "").files] == [
            ("tree/bö b/2/bob.2.wav", "Bobby", 5),
            ("tree/nothing.wav", "tree", 0),
        ]
    finally:
        process.kill()
        process.wait()
