"""The tar writer: byte for byte what the standard library writes."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tar import HashedTar, header_of

NAMES = st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=90).filter(
    lambda name: len(name.encode()) <= 100
)


def by_tarfile(members: list[tuple[str, bytes]]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime, header.mode = len(content), 0, 0o644
            archive.addfile(header, io.BytesIO(content))
    return target.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=3_000)), max_size=12))
def test_archives_are_those_of_tarfile(members: list[tuple[str, bytes]]) -> None:
    target = io.BytesIO()
    tar = HashedTar(target)
    places = [place for pair in range(0, len(members), 2) for place in tar.add(members[pair : pair + 2])]
    tar.finish()
    written = target.getvalue()
    assert written == by_tarfile(members)
    assert [written[place : place + len(content)] for place, (_, content) in zip(places, members, strict=True)] == [
        content for _, content in members
    ]
    assert (tar.size, tar.sha256.hexdigest()) == (len(written), hashlib.sha256(written).hexdigest())


def test_large_sizes_are_written_as_tarfile_does() -> None:
    for size in (0, 7, 8**11 - 1):
        header = tarfile.TarInfo("a/b.flac")
        header.size, header.mtime, header.mode = size, 0, 0o644
        assert header_of("a/b.flac", size) == header.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "size"), [("ä" * 51, 1), ("a", 8**11)])
def test_what_does_not_fit_is_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="does not fit into a USTAR header"):
        header_of(name, size)
