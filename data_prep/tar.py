"""A shard's tar, written from front to end and hashed on the way.

In: names and contents. Out: USTAR with fixed owner and time 0, so that equal members give equal bytes: those that
:mod:`tarfile` writes, in a tenth of its time.
"""

from __future__ import annotations

import hashlib
import tarfile
from typing import IO

_BLOCK = tarfile.BLOCKSIZE
_NAME = 100  # bytes of a header that hold the name; then come numbers in octal, size and checksum among them
_SIZE, _CHECKSUM = slice(124, 136), slice(148, 156)


def _template() -> bytes:
    header = tarfile.TarInfo()
    header.mode, header.mtime = 0o644, 0
    return header.tobuf(tarfile.USTAR_FORMAT)


_TEMPLATE = _template()
# A header's checksum is the sum of its bytes, with spaces where the checksum stands.
_TEMPLATE_SUM = sum(_TEMPLATE) - sum(_TEMPLATE[_SIZE]) - sum(_TEMPLATE[_CHECKSUM]) + 8 * ord(" ")


def header_of(name: str, size: int) -> bytes:
    """The header block of a file; raises ``ValueError`` for what USTAR can't hold."""
    encoded, octal = name.encode(), b"%011o\0" % size
    if len(encoded) > _NAME or len(octal) > 12:
        raise ValueError(f"member {name} of {size} bytes does not fit into a USTAR header")
    checksum = b"%06o\0 " % (_TEMPLATE_SUM + sum(encoded) + sum(octal))
    parts = (
        encoded.ljust(_NAME, b"\0"),
        _TEMPLATE[_NAME : _SIZE.start],
        octal,
        _TEMPLATE[_SIZE.stop : _CHECKSUM.start],
        checksum,
        _TEMPLATE[_CHECKSUM.stop :],
    )
    return b"".join(parts)


class HashedTar:
    """Writes members to a file; ``sha256`` and ``size`` are those of what is written. ``finish()`` ends the archive."""

    def __init__(self, file: IO[bytes]) -> None:
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._file = file

    def add(self, members: list[tuple[str, bytes]]) -> list[int]:
        """Append these, and return where the bytes of each begin."""
        parts, places, place = [], [], self.size
        for name, content in members:
            places.append(place + _BLOCK)
            padding = bytes(-len(content) % _BLOCK)
            parts += [header_of(name, len(content)), content, padding]
            place += _BLOCK + len(content) + len(padding)
        self._write(b"".join(parts))
        return places

    def finish(self) -> None:
        """Write the two empty blocks that end an archive, and fill its last record."""
        self._write(bytes(2 * _BLOCK + -(self.size + 2 * _BLOCK) % tarfile.RECORDSIZE))

    def _write(self, content: bytes) -> None:
        self.sha256.update(content)
        self._file.write(content)
        self.size += len(content)
