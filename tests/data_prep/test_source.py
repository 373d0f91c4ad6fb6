"""The scan: trees, tars and lists give the same files, with keys that WebDataset and USTAR accept."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from data_prep.source import SourceError, scan


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
