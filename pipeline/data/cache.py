"""Shards of a remote data set on this machine: whole files in a folder of bounded size.

In: a remote folder, a file's name and its SHA-256. Out: an open descriptor of a file here whose content has that hash.
Files are named by their hash, so data sets, runs and the ranks of a machine share a folder: a file is downloaded
beside, checked and renamed, by whichever rank asks first, while the others wait for it; the files that were used
longest ago make room. A store that is slow is told in the log, one that is dead is an error (see
:mod:`pipeline.data.storage`).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from pipeline.data.index import ShardError
from pipeline.data.storage import Folder, Patience, StoreError

logger = logging.getLogger(__name__)

DEFAULT_GIGABYTES = 50.0
SAY_EVERY = 10.0  # seconds of waiting between two lines in the log
_DOWNLOADS = 4  # at a time that someone waits for, and as many others
_POLL = 0.05  # seconds
_PART = ".part"  # of a download under way: HASH.BYTES.part
_LOCK = ".lock"  # of a file, while it is downloaded; HASH is the finished file


class RemoteFile(NamedTuple):
    """A file of a data set, as its manifest tells of it."""

    name: str  # relative to the data set
    sha256: str
    size: int = 0  # bytes, 0 if unknown


def default_cache() -> Path:
    """The folder for a user's shards on this machine, below the one for temporary files."""
    return Path(tempfile.gettempdir()) / f"tessera-cache-{os.getuid()}"


class ShardCache:
    """Files of remote data sets in ``folder``, at most ``gigabytes`` of them (1e9 bytes each); whoever still reads a
    removed file keeps it on the disk until it is closed.

    Raises ``ValueError`` if ``gigabytes`` is not above 0.
    """

    def __init__(self, folder: str | Path | None = None, gigabytes: float = DEFAULT_GIGABYTES) -> None:
        if not gigabytes > 0:
            raise ValueError(f"data.cache_gigabytes={gigabytes}: use a number above 0, such as {DEFAULT_GIGABYTES:g}")
        self.folder = default_cache() if folder is None else Path(folder)
        self.limit = int(gigabytes * 1e9)
        self._downloads: dict[str, tuple[Future[None], bool]] = {}  # by hash; whether someone waits for it
        self._starting = Lock()
        self._pools: dict[bool, ThreadPoolExecutor] = {}  # of downloads that someone waits for, and of the others

    def open(self, store: Folder, file: RemoteFile) -> int:
        """A descriptor to read the file with, downloaded first if need be; the caller closes it.

        Raises :class:`ShardError` if the file is missing or has another hash, or does not fit, and
        :class:`StoreError` if the store does not answer.
        """
        path = self.folder / file.sha256
        for _ in range(10):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._wait(store, file, self._start(store, file, urgent=True))
                continue
            os.utime(descriptor)  # used now: the last to make room
            return descriptor
        raise ShardError(
            f"{store.url(file.name)} is removed from {self.folder} before it can be read, for all who read have too "
            f"little room there: use more than data.cache_gigabytes={self.limit / 1e9:g}"
        )

    def prefetch(self, store: Folder, files: Iterable[RemoteFile]) -> None:
        """Begin to download the files that are not here, in the background; together they take at most half of the
        room, so that what is being read stays. A failure is in the log, and shows when the file is opened.
        """
        room = self.limit // 2
        for file in files:
            room -= file.size
            if room < 0:
                return
            if not (self.folder / file.sha256).exists():
                self._start(store, file, urgent=False)

    def close(self) -> None:
        """Give up what has not begun, and wait for what has."""
        with self._starting:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)

    def _start(self, store: Folder, file: RemoteFile, urgent: bool) -> Future[None]:
        with self._starting:
            future, waited_for = self._downloads.get(file.sha256, (None, False))
            if future is not None and (waited_for or not (urgent and future.cancel())):
                return future  # but what nobody waited for yet and is not begun goes to the front
            if urgent not in self._pools:
                self._pools[urgent] = ThreadPoolExecutor(_DOWNLOADS, thread_name_prefix="tessera-download")
            future = self._pools[urgent].submit(self._download, store, file)
            self._downloads[file.sha256] = future, urgent
        future.add_done_callback(lambda done: self._forget(file, done))
        return future

    def _forget(self, file: RemoteFile, done: Future[None]) -> None:
        if self._downloads.get(file.sha256, (None, False))[0] is done:
            del self._downloads[file.sha256]

    def _wait(self, store: Folder, file: RemoteFile, download: Future[None]) -> None:
        began = time.monotonic()
        while True:
            try:
                return download.result(SAY_EVERY)
            except StillRunning:
                if download.done():  # it raised a TimeoutError of its own
                    raise
            here = _size(self._part(file)) or 0
            logger.warning(
                "waiting since %.0f s for %s: %.1f of %.1f MB are here",
                time.monotonic() - began,
                store.url(file.name),
                here / 1e6,
                file.size / 1e6,
            )

    def _download(self, store: Folder, file: RemoteFile) -> None:
        path = self.folder / file.sha256
        if file.size > self.limit:
            raise ShardError(
                f"{store.url(file.name)} has {file.size / 1e9:.3g} GB, data.cache_gigabytes={self.limit / 1e9:g} holds "
                f"less: use {2 * file.size / 1e9:.3g} or more"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self._part(file)
        patience = getattr(store, "patience", Patience())
        with self._sole_download(self.folder / f"{file.sha256}{_LOCK}", part, patience):
            if path.exists():
                return  # another rank was faster
            try:
                self._reserve(part, file.size)
                self._fetch(store, file, part)
                with self._room():  # or who counts meanwhile could miss both names
                    part.replace(path)
            except FileNotFoundError:
                raise ShardError(f"{store.url(file.name)} is missing: run `tessera verify {store.place}`") from None
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise StoreError(
                    f"the disk of {self.folder} is full, data.cache_gigabytes={self.limit / 1e9:g} do not fit: use "
                    "less, or set data.cache to another folder"
                ) from error
            finally:
                part.unlink(missing_ok=True)

    def _fetch(self, store: Folder, file: RemoteFile, part: Path) -> None:
        for _ in range(2):  # what a bad transfer spoils is whole the next time
            store.fetch(file.name, part)
            with part.open("rb") as content:
                actual = hashlib.file_digest(content, "sha256").hexdigest()
            if actual == file.sha256:
                return
        raise ShardError(
            f"{store.url(file.name)}: its SHA-256 is {actual[:12]}…, the manifest says {file.sha256[:12]}…: "
            f"run `tessera verify {store.place}`"
        )

    def _part(self, file: RemoteFile) -> Path:
        return self.folder / f"{file.sha256}.{file.size}{_PART}"

    @contextmanager
    def _sole_download(self, lock: Path, part: Path, patience: Patience) -> Iterator[None]:
        """Hold a file's lock, which ends with the process that holds it; wait while another does and gets on."""
        since, seen = time.monotonic(), _size(part)
        while True:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if _lock(descriptor) and _is(descriptor, lock):
                    try:
                        yield
                    finally:
                        lock.unlink()
                    return
            finally:
                os.close(descriptor)
            size = _size(part)
            if size != seen:
                since, seen = time.monotonic(), size
            silent = time.monotonic() - since
            if silent > patience.attempts * (patience.timeout + patience.longest_pause):
                raise StoreError(f"{part}: the process that downloads it got nowhere for {silent:.0f} s: stop it")
            time.sleep(_POLL)

    def _reserve(self, part: Path, size: int) -> None:
        """Create ``part``, which counts with its final size, when that much room is left; the files that were used
        longest ago make it, and what dead processes left. If only other downloads' ends give room, it waits for them.
        """
        while True:
            with self._room():
                self._remove_left()
                taken, files = 0, []
                for path in self.folder.iterdir():
                    with suppress(FileNotFoundError):
                        status = path.stat()
                        taken += max(status.st_size, _final_size(path))
                        if not path.suffix:
                            files.append((status.st_mtime_ns, status.st_size, path))
                for _, each, path in sorted(files):
                    if taken + size > self.limit:
                        path.unlink(missing_ok=True)
                        taken -= each
                if taken + size <= self.limit:
                    part.touch()
                    return
            time.sleep(_POLL)

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Let no other process count what the folder holds, or add to it."""
        with (self.folder / "room").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _remove_left(self) -> None:
        """Remove locks and parts of processes that died."""
        for lock in self.folder.glob(f"*{_LOCK}"):
            with suppress(FileNotFoundError):
                descriptor = os.open(lock, os.O_RDWR)
                try:
                    if _lock(descriptor) and _is(descriptor, lock):
                        for part in self.folder.glob(f"{lock.stem}.*{_PART}"):
                            part.unlink()
                        lock.unlink()
                finally:
                    os.close(descriptor)


def _size(path: Path) -> int | None:
    """Bytes that are there so far, or None: others rename and remove at any time."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _final_size(path: Path) -> int:
    return int(path.name.split(".")[1]) if path.suffix == _PART else 0


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file, unless another has it; it ends when the file is closed, by death too."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is(descriptor: int, path: Path) -> bool:
    """Whether ``path`` still is the file behind ``descriptor``, and not removed since it was opened."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
