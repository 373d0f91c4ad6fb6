"""Where files lie: in a folder of this machine, or behind a URL of an object store or web server that fsspec knows.

In: a path or a URL such as ``s3://bucket/set``. Out: a :class:`Folder`, whose files are read, listed and written
whole or not at all (design rule 7). A remote store that fails is asked again, a bounded number of times with growing
pauses, each told in the log; then :class:`StoreError` names the URL. Credentials and endpoints are the store's own
affair: environment variables or configuration files of its tools, such as ``AWS_PROFILE`` and ``AWS_ENDPOINT_URL``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar
from urllib.parse import quote, unquote
from uuid import uuid4

from pydantic import BeforeValidator

logger = logging.getLogger(__name__)

PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs", "hdfs": "pyarrow"}
ATTEMPTS = "TESSERA_STORE_ATTEMPTS"
TIMEOUT = "TESSERA_STORE_TIMEOUT"
_BLOCK = 8 << 20  # bytes read ahead of a remote file that is read in order
_CONNECTIONS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # this machine's disk, not the store
_Value = TypeVar("_Value")


class StoreError(RuntimeError):
    """A remote store that can't be used; the message names the URL, the reason, and what would do."""


def is_remote(place: str | Path) -> bool:
    """Whether ``place`` is a URL and not a path of this machine."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(place)) is not None


def as_place(value: str | Path) -> str | Path:
    """A URL as it is, anything else as a path: ``Path("s3://a/b")`` would lose a slash."""
    return str(value) if is_remote(value) else Path(value)


Place = Annotated[Path | str, BeforeValidator(as_place)]  # a field of a configuration that takes either


@dataclass(frozen=True)
class Patience:
    """How often a remote store is asked, how long it may stay silent, and how long to pause between."""

    attempts: int = 6
    timeout: float = 60.0  # seconds without a byte
    first_pause: float = 0.5  # seconds; doubles each time
    longest_pause: float = 30.0

    @classmethod
    def of_environment(cls) -> Patience:
        """The defaults, or what ``TESSERA_STORE_ATTEMPTS`` and ``TESSERA_STORE_TIMEOUT`` (seconds) say; raises
        ``ValueError`` for values that mean nothing.
        """
        values = {}
        for name, kind, default in ((ATTEMPTS, int, cls.attempts), (TIMEOUT, float, cls.timeout)):
            text = os.environ.get(name, str(default))
            try:
                values[name] = kind(text)
            except ValueError:
                values[name] = -1
            if not values[name] > 0:
                raise ValueError(f"{name}={text}: use a number above 0, such as {default:g}")
        return cls(attempts=int(values[ATTEMPTS]), timeout=values[TIMEOUT])


@dataclass(frozen=True)
class StoredFile:
    """One file of a folder."""

    name: str  # relative to the folder, with slashes
    size: int  # bytes
    version: int  # another number when the content is another: nanoseconds of its time, or a hash of the store's tag


class Folder(ABC):
    """The files below one place; names are relative to it, with slashes. Pickles, so Ray tasks take it."""

    place: Path | str

    def url(self, name: str) -> str:
        """What people call a file."""
        return f"{str(self.place).rstrip('/')}/{name}"

    @abstractmethod
    def look(self, name: str) -> StoredFile | None:
        """What is known of a file without reading it, or None if there is none."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        stored = self.look(name)
        return None if stored is None else stored.size

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A file's content; raises ``FileNotFoundError`` if there is none."""

    @abstractmethod
    def read_part(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of a file from ``offset`` on, fewer where it ends."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """A file to read from and to seek in."""

    @abstractmethod
    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a path of this machine, which may be half-written after an error."""

    @abstractmethod
    def publish(self, finished: Path, name: str) -> None:
        """Make a whole, synced file of this machine the folder's ``name``; it is moved or copied, and then there
        durably.
        """

    @abstractmethod
    def files(self) -> Iterator[StoredFile]:
        """Every file below, in no order; nothing if the folder does not exist."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    @abstractmethod
    def write_whole(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all."""


def open_folder(place: str | Path, patience: Patience | None = None) -> Folder:
    """The folder at a path or a URL; nothing is read yet.

    Raises :class:`StoreError` if the URL's protocol is unknown or its package is not installed.
    """
    return RemoteFolder(str(place), patience or Patience.of_environment()) if is_remote(place) else LocalFolder(place)


class LocalFolder(Folder):
    """A folder of this machine, or of a file system that is mounted here."""

    place: Path

    def __init__(self, place: str | Path) -> None:
        self.place = Path(place)

    def look(self, name: str) -> StoredFile | None:
        path = self.place / name
        if not path.is_file():
            return None
        status = path.stat()
        return StoredFile(name, status.st_size, status.st_mtime_ns)

    def read(self, name: str) -> bytes:
        return (self.place / name).read_bytes()

    def read_part(self, name: str, offset: int, size: int) -> bytes:
        with (self.place / name).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def open(self, name: str) -> IO[bytes]:
        return (self.place / name).open("rb")

    def fetch(self, name: str, target: Path) -> None:
        shutil.copyfile(self.place / name, target)

    def publish(self, finished: Path, name: str) -> None:
        target = self.place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        finished.replace(target)
        fsync_folder(target.parent)

    def files(self) -> Iterator[StoredFile]:
        for folder, _, files in os.walk(self.place):
            for file in files:
                path = Path(folder) / file
                try:
                    status = path.stat()
                except FileNotFoundError:  # removed meanwhile, or a link to nowhere
                    continue
                yield StoredFile(path.relative_to(self.place).as_posix(), status.st_size, status.st_mtime_ns)

    def remove(self, name: str) -> None:
        (self.place / name).unlink(missing_ok=True)

    def write_whole(self, name: str, content: bytes) -> None:
        target = self.place / name
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, content)


class RemoteFolder(Folder):
    """A folder behind a URL. Object stores take a file whole or not at all, so nothing is renamed there."""

    place: str

    def __init__(self, place: str, patience: Patience) -> None:
        self.place = place.rstrip("/")
        self.patience = patience
        self._files, self._root = _file_system(self.place, patience)
        self._web = self.place.startswith(("http://", "https://"))
        if self._web:
            self._root = quote(self._root, safe="/:@%")

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.place, self.patience)  # connections stay in their process

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{quote(name) if self._web else name}"

    def _patiently(self, name: str, action: Callable[[], _Value]) -> _Value:
        return patiently(name if is_remote(name) else self.url(name), action, self.patience)

    def _writable(self, name: str) -> str:
        if self._web:
            raise StoreError(f"{self.place} is a web server's: write into a folder, s3://… or gs://…")
        return self._path(name)

    def look(self, name: str) -> StoredFile | None:
        try:
            info = self._patiently(name, lambda: self._files.info(self._path(name)))
        except FileNotFoundError:
            return None
        return StoredFile(name, info["size"] or 0, _version(info)) if info["type"] == "file" else None

    def read(self, name: str) -> bytes:
        return self._patiently(name, lambda: self._files.cat_file(self._path(name)))

    def read_part(self, name: str, offset: int, size: int) -> bytes:
        part = self._patiently(name, lambda: self._files.cat_file(self._path(name), start=offset, end=offset + size))
        if len(part) > size:
            raise StoreError(
                f"{self.url(name)}: the server sends whole files only: copy it here, or to an object store"
            )
        return part

    def open(self, name: str) -> IO[bytes]:
        file = self._patiently(name, lambda: self._files.open(self._path(name), "rb", block_size=_BLOCK))
        return _PatientFile(file, self.url(name), self.patience)  # type: ignore[return-value]

    def fetch(self, name: str, target: Path) -> None:
        self._patiently(name, lambda: self._files.get_file(self._path(name), str(target)))

    def publish(self, finished: Path, name: str) -> None:
        target = self._writable(name)
        self._patiently(name, lambda: self._files.put_file(str(finished), target))
        finished.unlink()

    def files(self) -> Iterator[StoredFile]:
        def find() -> dict[str, dict[str, Any]]:
            return self._files.find(self._root, detail=True)

        try:
            found = self._patiently("", find)
        except FileNotFoundError:
            return
        unsized = [path for path, info in found.items() if info["size"] is None and not set("?#") & set(path)]
        with ThreadPoolExecutor(_CONNECTIONS) as pool:  # a web server's page of links tells no sizes
            asked = pool.map(lambda path: self._patiently(path, lambda: self._files.info(path)), unsized)
            found |= dict(zip(unsized, asked, strict=True))
        for path, info in found.items():
            name = path.removeprefix(self._root).lstrip("/")
            if name and info["size"] is not None:
                yield StoredFile(unquote(name) if self._web else name, info["size"], _version(info))

    def remove(self, name: str) -> None:
        target = self._writable(name)
        with suppress(FileNotFoundError):
            self._patiently(name, lambda: self._files.rm_file(target))

    def write_whole(self, name: str, content: bytes) -> None:
        target = self._writable(name)
        self._patiently(name, lambda: self._files.pipe_file(target, content))


class _PatientFile:
    """A remote file that is read in order, with jumps; what tarfile needs of one."""

    def __init__(self, file: Any, url: str, patience: Patience) -> None:
        self._file, self._url, self._patience = file, url, patience
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int = -1) -> bytes:
        return patiently(self._url, lambda: self._file.read(size), self._patience)

    def __enter__(self) -> _PatientFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def patiently(url: str, action: Callable[[], _Value], patience: Patience) -> _Value:
    """Do ``action``, and again after a growing pause while the store fails it; each failure is told in the log.

    Raises ``FileNotFoundError`` as it comes, and :class:`StoreError` naming ``url`` where asking again would not help,
    or has not.
    """
    began, pause = time.monotonic(), patience.first_pause
    for attempt in range(1, patience.attempts + 1):
        try:
            return action()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                raise
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if _final(error):
                raise StoreError(f"{url}: {reason}: check the address and the credentials") from error
            if attempt == patience.attempts:
                spent = time.monotonic() - began
                raise StoreError(
                    f"{url} did not answer in {attempt} attempts and {spent:.0f} s ({reason}): repeat the command when "
                    f"the store is back, or set {ATTEMPTS} or {TIMEOUT} (seconds) higher"
                ) from error
            logger.warning("%s: %s; attempt %d of %d, again in %.1f s", url, reason, attempt, patience.attempts, pause)
            time.sleep(pause)
            pause = min(2 * pause, patience.longest_pause)
    raise AssertionError("attempts are at least one")


def _final(error: Exception) -> bool:
    """Whether asking again can't help: no permission, no credentials, a request that means nothing."""
    if isinstance(error, PermissionError | NotImplementedError | TypeError | ValueError | KeyError):
        return True
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
        return True
    status = getattr(error, "status", 0)  # aiohttp's
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)


def _file_system(place: str, patience: Patience) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Listings are not remembered: others write too; and no layer
    but ours asks again, or the attempts would multiply.
    """
    import fsspec

    protocol = place.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        config = {"connect_timeout": patience.timeout, "read_timeout": patience.timeout, "retries": {"max_attempts": 0}}
        options = {"use_listings_cache": False, "config_kwargs": config}
    elif protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=patience.timeout, sock_read=patience.timeout)
        options = {"client_kwargs": {"timeout": timeout}}
    try:
        files, root = fsspec.core.url_to_fs(place, **options)
    except ImportError as error:
        package = PACKAGES.get(protocol, f"the package that fsspec uses for {protocol}://")
        raise StoreError(f"{place} needs {package}: pip install {package} ({error})") from error
    except ValueError as error:
        raise StoreError(f"{place}: {error}: use a folder, s3://…, gs://… or https://…") from error
    if protocol in ("s3", "s3a"):
        files.retries = 1
    return files, root


def _version(info: dict[str, Any]) -> int:
    """Of what a store tells about a file: its tag if there is one, else its time."""
    for name in ("ETag", "etag", "Content-MD5", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime"):
        if info.get(name):
            return int.from_bytes(sha256(str(info[name]).encode()).digest()[:7], "little")
    return 0


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file beside, fsync it, and rename it into place; after an error nothing of it stays."""
    # Hosts that share a file system share process numbers too, so those would not tell two writers apart.
    temporary = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
