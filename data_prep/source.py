"""What there is to prepare: the files of a tree, a tar or a list, with their keys and labels.

In: a path. Out: :class:`SourceFile` values sorted by name, the same whatever order the file system lists them in.
Reads folder entries, tar headers and LibriSpeech's transcripts; opens no sound and no picture.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

SUFFIXES = {
    "speech": {".flac", ".wav", ".ogg", ".opus", ".mp3"},
    "image": {".jpg", ".jpeg", ".png", ".webp", ".bmp"},
}
LONGEST_KEY = 90  # bytes; USTAR names hold 100 with the suffix


class SourceError(ValueError):
    """A source that can't be scanned; the message names it and what would do."""


@dataclass(frozen=True)
class SourceFile:
    """One file to check and store."""

    key: str  # name in the shard, unique in the data set
    name: str  # path within the source, for people
    path: str  # the file to open: the source file itself, or the tar that holds it
    offset: int  # where it begins in that file
    size: int  # bytes
    modified: int  # nanoseconds; a changed file makes another preparation
    label: str  # speaker or image class; "" for none
    text: str = ""  # transcript

    def read(self) -> bytes:
        """The file's content."""
        with Path(self.path).open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Scan:
    """The files of one kind, and how many others were passed over."""

    files: list[SourceFile]
    ignored: int


def scan(kind: str, source: Path, leave_out: Path) -> Scan:
    """List the source's files of ``kind``; nothing below the folder ``leave_out`` is taken.

    Raises :class:`SourceError` if the source is missing, packed, or holds no such file.
    """
    if source.is_dir():
        found = list(_tree(source, leave_out.resolve()))
    elif not source.is_file():
        raise SourceError(f"source {source} does not exist: use a folder, a .tar file, or a text file that lists paths")
    elif source.suffix == ".tar":
        found = list(_tar(source))
    elif source.suffix in {".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip"}:
        raise SourceError(f"source {source} is packed: unpack it, or make it a plain .tar")
    else:
        found = list(_list(source))
    texts = _transcripts([file for file in found if file.name.endswith(".trans.txt")]) if kind == "speech" else {}
    wanted = [file for file in found if PurePosixPath(file.name).suffix.lower() in SUFFIXES[kind]]
    if not wanted:
        suffixes = ", ".join(sorted(SUFFIXES[kind]))
        raise SourceError(f"source {source} holds no {kind} files: {len(found)} files, none ends in {suffixes}")
    wanted.sort(key=lambda file: file.name)
    named = [
        replace(file, label=file.label or _label(kind, file.name), text=texts.get(_stem(file.name), ""))
        for file in wanted
    ]
    return Scan(_with_unique_keys(named), len(found) - len(wanted))


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix(""))


def _label(kind: str, name: str) -> str:
    """Speaker of ``speaker/chapter/clip`` as LibriSpeech has it, or class of ``class/image`` as ImageNet has it."""
    folders = PurePosixPath(name).parts[:-1]
    if not folders:
        return ""
    return folders[-2] if kind == "speech" and len(folders) >= 2 else folders[-1]


def _tree(source: Path, leave_out: Path) -> Iterator[SourceFile]:
    seen: set[str] = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        # A link may lead back into the tree: each real folder is walked once, and in the order of names.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = str(Path(folder).resolve())
        if real in seen or Path(real) == leave_out:
            folders[:] = []
            continue
        seen.add(real)
        for name in sorted(files):
            path = Path(folder) / name
            if not name.startswith(".") and path.is_file():
                yield _plain_file(path, path.relative_to(source).as_posix(), "")


def _list(source: Path) -> Iterator[SourceFile]:
    """One path a line, relative to the list's folder or absolute; a label may follow after a tab."""
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise SourceError(f"source {source} is neither a folder, a .tar, nor a text file that lists paths") from error
    for line in lines:
        place, _, label = line.partition("\t")
        if place.strip():
            path = source.parent / place.strip()
            yield _plain_file(path, place.strip().lstrip("/"), label.strip())


def _plain_file(path: Path, name: str, label: str) -> SourceFile:
    try:
        status = path.stat()
    except OSError:  # a listed file that is missing is refused by the check, with its name
        return SourceFile("", name, str(path), 0, 0, 0, label)
    return SourceFile("", name, str(path.resolve()), 0, status.st_size, status.st_mtime_ns, label)


def _tar(source: Path) -> Iterator[SourceFile]:
    modified = source.stat().st_mtime_ns
    try:
        with tarfile.open(source, mode="r:") as archive:
            for member in archive:
                if member.isfile():
                    name = member.name.removeprefix("./")
                    yield SourceFile("", name, str(source.resolve()), member.offset_data, member.size, modified, "")
    except tarfile.TarError as error:
        raise SourceError(f"source {source} is not a readable tar: {error}") from error


def _transcripts(files: list[SourceFile]) -> dict[str, str]:
    """LibriSpeech's ``speaker-chapter.trans.txt``: a line ``<clip> <text>`` for each clip of the folder."""
    texts: dict[str, str] = {}
    for file in files:
        folder = PurePosixPath(file.name).parent
        for line in file.read().decode("utf-8", errors="replace").splitlines():
            clip, _, text = line.partition(" ")
            texts[str(folder / clip)] = text.strip()
    return texts


def _with_unique_keys(files: list[SourceFile]) -> list[SourceFile]:
    """WebDataset keys: no dot after the last slash, short enough for USTAR, no two alike."""
    taken: set[str] = set()
    keyed = []
    for file in files:
        key = re.sub(r"[^\w/+=@-]", "_", _stem(file.name).strip("/"))
        if len(key.encode()) > LONGEST_KEY or key in taken:
            digest = hashlib.sha256(file.name.encode()).hexdigest()[:16]
            key = key.encode()[: LONGEST_KEY - 17].decode(errors="ignore").rstrip("/") + f"-{digest}"
        taken.add(key)
        keyed.append(replace(file, key=key))
    return keyed
