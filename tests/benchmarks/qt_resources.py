"""Reader of Qt's binary resource files (.rcc), which hold GCompris' photographs.

In: a file. Out: its members' names and bytes. The format is Qt's ``qrc`` tree, versions 1 to 3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_COMPRESSED, _FOLDER, _ZSTANDARD = 1, 2, 4


def read_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield ``(name, bytes)`` of each file inside; members packed with Zstandard are left out.

    Raises ``ValueError`` if the file is not a Qt resource.
    """
    content = path.read_bytes()
    if content[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file: it starts with {content[:4]!r}, not b'qres'")
    version, tree, data, names = struct.unpack_from(">4I", content, 4)
    node_size = 22 if version >= 2 else 14

    def name_at(offset: int) -> str:
        (length,) = struct.unpack_from(">H", content, names + offset)
        start = names + offset + 6  # two bytes of length, four of hash
        return content[start : start + 2 * length].decode("utf-16-be")

    def walk(node: int, folder: str) -> Iterator[tuple[str, bytes]]:
        place = tree + node * node_size
        name_offset, flags = struct.unpack_from(">IH", content, place)
        name = f"{folder}/{name_at(name_offset)}" if node else ""
        if flags & _FOLDER:
            count, first = struct.unpack_from(">II", content, place + 6)
            for child in range(first, first + count):
                yield from walk(child, name)
            return
        (data_offset,) = struct.unpack_from(">I", content, place + 10)
        (size,) = struct.unpack_from(">I", content, data + data_offset)
        start = data + data_offset + 4
        member = content[start : start + size]
        if flags & _COMPRESSED:
            member = zlib.decompress(member[4:])  # the first four bytes are the unpacked size
        if not flags & _ZSTANDARD:
            yield name, member

    yield from walk(0, "")
