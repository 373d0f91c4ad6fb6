"""What there is to prepare: the files of a tree, of tars or of a list, with their keys, labels and transcripts.

In: a path or a URL. Out: :class:`SourceFile` values sorted by name, the same whatever order the file system lists them
in. Reads folder entries, tar headers, LibriSpeech's transcripts and the small members beside a sample in WebDataset
tars; opens no sound and no picture.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.data.storage import Folder, is_remote, open_folder

SUFFIXES = {
    "speech": {".flac", ".wav", ".ogg", ".oga", ".opus", ".mp3"},
    "image": {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2"},
}
PACKED = {".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip", ".7z"}
LISTS = {".txt", ".tsv", ".lst", ".list"}  # of a URL; here any file that is no tar is one
LONGEST_KEY = 88  # bytes; USTAR names hold 100, with the number of a piece and the suffix
LABEL_FIELDS = ("label", "cls", "class", "speaker", "speaker_id")  # of a WebDataset sample's .json
TEXT_FIELDS = ("text", "transcript", "transcription", "caption", "sentence")
_LONGEST_SIDECAR = 1 << 20  # bytes of a .json, .txt or .cls that is read
_CONNECTIONS = 16  # to a remote source at a time
_ASKED_AT_ONCE = 4096
_BYTES_AHEAD = 64 << 20  # of remote files that wait for the check


class SourceError(ValueError):
    """A source that can't be scanned; the message names it and what would do."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to check and store."""

    key: str  # name in the shard, unique in the data set
    name: str  # path within the source, for people
    path: str  # the file to open, a path or a URL: the source file itself, or the tar that holds it
    offset: int  # where it begins in that file
    size: int  # bytes
    modified: int  # nanoseconds, or a hash of a store's tag; a changed file makes another preparation
    label: str  # speaker or image class; "" for none
    text: str = ""  # transcript or caption

    def read(self) -> bytes:
        """The file's content."""
        if not is_remote(self.path):
            with Path(self.path).open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        folder, name = _remote_file(self.path)
        # A tar begins with a header, so what begins a file is all of it; web servers may know whole files only.
        return folder.read_part(name, self.offset, self.size) if self.offset else folder.read(name)


@dataclass(frozen=True)
class Scan:
    """The files of one kind, and how many others were passed over."""

    files: list[SourceFile]
    ignored: int


def scan(kind: str, source: str | Path, leave_out: str | Path) -> Scan:
    """List the source's files of ``kind``; nothing below the folder ``leave_out`` is taken.

    The source is a folder, a tar, or a text file with a path or URL a line, here or behind a URL (there a list ends in
    .txt, .tsv, .lst or .list). Tars in a folder or a list are opened too; members that share a sample's name up to its
    first dot, as WebDataset has it, give its label (.cls, .json) and its text (.txt, .json).

    Raises :class:`SourceError` if the source is missing, packed, or holds no such file, and
    :class:`pipeline.data.storage.StoreError` if a remote one does not answer.
    """
    place = PurePosixPath(str(source))
    here = not is_remote(source)
    if here and not Path(source).exists():
        raise SourceError(
            f"source {source} does not exist: use a folder, a .tar file, a text file that lists paths, or a URL of one"
        )
    if here and Path(source).is_dir():
        listed = list(_tree(Path(source), Path(leave_out).resolve()))
    elif place.suffix in PACKED:
        raise SourceError(f"source {source} is packed: unpack it, or make it a plain .tar")
    elif place.suffix == ".tar":
        listed = [_single(str(source), "")]  # no name: its members' names are the source's
    elif here or place.suffix in LISTS:
        listed = list(_list(str(source)))
    else:
        listed = list(_remote_tree(str(source), str(leave_out)))
    found = [replace(file, label=file.label or _label(kind, file.name)) for file in listed if not _is_tar(file)]
    with ThreadPoolExecutor(1 if here else _CONNECTIONS) as pool:
        for members in pool.map(lambda file: _members(kind, file), filter(_is_tar, listed)):
            found += members
        texts = _transcripts(found, pool) if kind == "speech" else {}
    wanted = [file for file in found if _suffix(file) in SUFFIXES[kind]]
    if not wanted:
        suffixes = ", ".join(sorted(SUFFIXES[kind]))
        raise SourceError(f"source {source} holds no {kind} files: {len(found)} files, none ends in {suffixes} or .tar")
    wanted.sort(key=lambda file: file.name)
    named = [replace(file, text=file.text or texts.get(_stem(file.name), "")) for file in wanted]
    return Scan(_with_unique_keys(named), len(found) - len(wanted))


def read_ahead(files: Sequence[SourceFile]) -> Iterator[Callable[[], bytes]]:
    """What reads each file, in turn: remote ones are asked for ahead, some at a time, for a store takes its time."""
    if not any(is_remote(file.path) for file in files):
        yield from (file.read for file in files)
        return
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        asked: deque[Future[bytes]] = deque()
        try:
            ahead, bytes_ahead = 0, 0
            for place, file in enumerate(files):
                while ahead < len(files) and (ahead <= place or bytes_ahead + files[ahead].size <= _BYTES_AHEAD):
                    asked.append(pool.submit(files[ahead].read))
                    bytes_ahead += files[ahead].size
                    ahead += 1
                bytes_ahead -= file.size
                yield asked.popleft().result
        finally:
            for future in asked:
                future.cancel()


def _suffix(file: SourceFile) -> str:
    return PurePosixPath(file.name).suffix.lower()


def _stem(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix(""))


def _label(kind: str, name: str) -> str:
    """Speaker of ``speaker/chapter/clip`` as LibriSpeech has it, or class of ``class/image`` as ImageNet has it."""
    folders = PurePosixPath(name).parts[:-1]
    if not folders:
        return ""
    return folders[-2] if kind == "speech" and len(folders) >= 2 else folders[-1]


def _printable(name: str) -> str:
    """A name that can be encoded: bytes of a file's name that are no UTF-8 show as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
        within = Path(folder).relative_to(source)
        for name in sorted(files):
            if name.startswith("."):
                continue
            path = f"{real}/{name}"
            try:
                status = Path(path).stat()  # once a file: on a cluster's file system each question takes its time
            except OSError:  # a link to nowhere
                continue
            if stat.S_ISREG(status.st_mode):
                shown = _printable((within / name).as_posix())
                yield SourceFile("", shown, path, 0, status.st_size, status.st_mtime_ns, "")


def _remote_tree(source: str, leave_out: str) -> Iterator[SourceFile]:
    folder = open_folder(source)
    found = 0
    for file in folder.files():
        found += 1
        url = folder.url(file.name)
        hidden = any(part.startswith(".") for part in file.name.split("/"))
        if not hidden and not url.startswith(leave_out.rstrip("/") + "/"):
            yield SourceFile("", file.name, url, 0, file.size, file.version, "")
    if not found:
        lists = ", ".join(sorted(LISTS))
        raise SourceError(
            f"source {source} does not exist or is empty: use the URL of a folder, of a .tar, or of a list that ends "
            f"in {lists}"
        )


def _list(source: str) -> Iterator[SourceFile]:
    """One path or URL a line, relative to the list's folder or absolute; a label may follow after a tab."""
    parent = source.rpartition("/")[0] if is_remote(source) else Path(source).parent
    try:
        content = _single(source, "").read()
    except FileNotFoundError:
        raise SourceError(f"source {source} does not exist: use the URL of a folder, a .tar or a list") from None
    try:
        lines = [line.partition("\t") for line in content.decode("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise SourceError(f"source {source} is neither a folder, a .tar, nor a text file that lists paths") from error

    def listed(line: tuple[str, str, str]) -> SourceFile:
        place, label = line[0].strip(), line[2].strip()
        path = place if is_remote(place) else f"{parent}/{place}" if is_remote(source) else str(Path(parent) / place)
        return _single(path, place.partition("://")[2] or place.lstrip("/"), label)

    lines = [line for line in lines if line[0].strip()]
    if not is_remote(source) and not any(is_remote(line[0].strip()) for line in lines):
        yield from map(listed, lines)
        return
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for first in range(0, len(lines), _ASKED_AT_ONCE):  # a future for each of millions would fill the memory
            yield from pool.map(listed, lines[first : first + _ASKED_AT_ONCE])


def _single(path: str, name: str, label: str = "") -> SourceFile:
    """A file at a path or a URL; one that is missing has no size, and is refused by the check, with its name."""
    name = _printable(name)
    if is_remote(path):
        folder, file = _remote_file(path)
        stored = folder.look(file)
        return SourceFile("", name, path, 0, stored.size if stored else 0, stored.version if stored else 0, label)
    try:
        status = Path(path).stat()
    except OSError:
        return SourceFile("", name, path, 0, 0, 0, label)
    return SourceFile("", name, str(Path(path).resolve()), 0, status.st_size, status.st_mtime_ns, label)


def _remote_file(url: str) -> tuple[Folder, str]:
    folder, _, name = url.rpartition("/")
    return open_folder(folder), name


def _is_tar(file: SourceFile) -> bool:
    return file.path.endswith(".tar")


def _members(kind: str, file: SourceFile) -> list[SourceFile]:
    try:
        with _open(file) as content, tarfile.open(fileobj=content, mode="r:") as archive:
            return list(_tar(kind, archive, file))
    except FileNotFoundError:
        raise SourceError(f"source {file.path} does not exist: use a folder, a .tar, a list, or a URL of one") from None
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"source {file.path} is not a readable tar: {error}") from error


def _open(file: SourceFile) -> Any:
    if not is_remote(file.path):
        return Path(file.path).open("rb")
    folder, name = _remote_file(file.path)
    return folder.open(name)


def _tar(kind: str, archive: tarfile.TarFile, tar: SourceFile) -> Iterator[SourceFile]:
    """A tar's members, those of a WebDataset sample with what the small ones beside them tell of it."""
    folder = f"{_stem(tar.name)}/" if tar.name else ""
    members: list[tuple[str, int, int]] = []  # name, offset, size
    told: dict[str, dict[str, str]] = {}  # by sample
    for member in archive:
        if not member.isfile():
            continue
        name = _printable(member.name.removeprefix("./"))
        members.append((name, member.offset_data, member.size))
        sample, suffix = _sample(name)
        if suffix in _TELLING and member.size <= _LONGEST_SIDECAR:
            content = archive.extractfile(member)
            assert content is not None  # it is a file
            text = content.read().decode("utf-8", errors="replace")
            told[sample] = told.get(sample, {}) | _TELLING[suffix](text)
        archive.members = []  # type: ignore[attr-defined]  # or a tar of millions would fill the memory
    for name, offset, size in members:
        about = told.get(_sample(name)[0], {}) if PurePosixPath(name).suffix.lower() in SUFFIXES[kind] else {}
        label = about.get("cls") or about.get("label") or tar.label or _label(kind, name)
        yield SourceFile("", folder + name, tar.path, offset, size, tar.modified, label, about.get("text", ""))


def _sample(name: str) -> tuple[str, str]:
    """A member's sample and the rest of its name, as WebDataset has it: divided at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    sample, _, suffix = file.partition(".")
    return folder + slash + sample, suffix.lower()


def _of_json(text: str) -> dict[str, str]:
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    about = {}
    for field, names in (("label", LABEL_FIELDS), ("text", TEXT_FIELDS)):
        given = [values[name] for name in names if isinstance(values, dict) and isinstance(values.get(name), str | int)]
        if given:
            about[field] = str(given[0])
    return about


_TELLING: dict[str, Callable[[str], dict[str, str]]] = {
    "json": _of_json,
    "txt": lambda text: {"text": text.strip()},
    "cls": lambda text: {"cls": text.strip()},
}


def _transcripts(found: list[SourceFile], pool: ThreadPoolExecutor) -> dict[str, str]:
    """LibriSpeech's ``speaker-chapter.trans.txt``: a line ``<clip> <text>`` for each clip of the folder."""
    files = [file for file in found if file.name.endswith(".trans.txt")]
    texts: dict[str, str] = {}
    for file, content in zip(files, pool.map(SourceFile.read, files), strict=True):
        folder = PurePosixPath(file.name).parent
        for line in content.decode("utf-8", errors="replace").splitlines():
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
