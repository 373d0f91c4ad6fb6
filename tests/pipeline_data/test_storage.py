"""Folders of this machine, of an S3 server and of a web server: the same reading and writing, and errors that name the
URL.
"""

from __future__ import annotations

import http.server
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from socket import create_server

import pytest

from pipeline.data import storage
from pipeline.data.storage import Patience, StoreError, as_place, is_remote, open_folder

SHORT = Patience(attempts=3, timeout=0.5, first_pause=0.01)


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "set")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_files_are_written_whole_and_read_back(place: str, tmp_path: Path) -> None:
    folder = open_folder(place)
    assert list(folder.files()) == []
    folder.write_whole("manifest.json", b"{}")
    (tmp_path / "finished").write_bytes(b"0123456789")
    folder.publish(tmp_path / "finished", "train/shard 0.tar")
    assert not (tmp_path / "finished").exists()
    assert {(file.name, file.size) for file in folder.files()} == {("manifest.json", 2), ("train/shard 0.tar", 10)}
    again = pickle.loads(pickle.dumps(folder))
    assert again.read("train/shard 0.tar") == b"0123456789"
    assert again.read_part("train/shard 0.tar", 3, 4) == b"3456"
    assert (again.size("manifest.json"), again.size("nothing"), again.size("train")) == (2, None, None)
    again.fetch("train/shard 0.tar", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    with again.open("train/shard 0.tar") as file:
        file.seek(8)
        assert file.read() == b"89"
    before = {file.name: file.version for file in folder.files()}
    folder.write_whole("manifest.json", b"[]")
    after = {file.name: file.version for file in folder.files()}
    assert [name for name in after if after[name] != before[name]] == ["manifest.json"]
    folder.remove("manifest.json")
    folder.remove("manifest.json")
    assert [file.name for file in folder.files()] == ["train/shard 0.tar"]
    with pytest.raises(FileNotFoundError, match=f"{folder.url('manifest.json')}"):
        folder.read("manifest.json")


def test_urls_stay_urls() -> None:
    assert as_place("s3://bucket/set") == "s3://bucket/set"
    assert as_place("data/set") == Path("data/set")
    assert [is_remote(place) for place in ("s3://b", "https://h/x", "/a/b", "a:b", Path("c"))] == [1, 1, 0, 0, 0]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of Python's own web server for ``tmp_path / "web"``."""
    (tmp_path / "web" / "a b").mkdir(parents=True)
    (tmp_path / "web" / "a b" / "é 1.txt").write_bytes(b"first")
    (tmp_path / "web" / "two.txt").write_bytes(b"second")
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", str(tmp_path / "web")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().partition("(")[2].partition(")")[0]
    finally:
        process.kill()
        process.wait()


def test_a_web_server_is_read_but_not_written(web: str, tmp_path: Path) -> None:
    folder = open_folder(web)
    assert {(file.name, file.size) for file in folder.files()} == {("a b/é 1.txt", 5), ("two.txt", 6)}
    assert folder.read("a b/é 1.txt") == b"first"
    with pytest.raises(StoreError, match="whole files only"):
        folder.read_part("two.txt", 1, 2)
    with pytest.raises(StoreError, match="is a web server's: write into a folder"):
        folder.write_whole("three.txt", b"")


class Failing(http.server.BaseHTTPRequestHandler):
    """Fails the first requests, then answers."""

    failures = 2
    status = 503

    def do_GET(self) -> None:
        type(self).failures -= 1
        self.send_response(200 if self.failures < 0 else self.status)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"there")

    def log_message(self, *_: object) -> None:
        """Silent."""


def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_store_that_fails_twice_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    server = serve(type("TwoFailures", (Failing,), {}))
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert open_folder(url, SHORT).read("x") == b"there"
        assert [record.message.split(";")[1] for record in caplog.records] == [
            " attempt 1 of 3, again in 0.0 s",
            " attempt 2 of 3, again in 0.0 s",
        ]
        assert all(record.message.startswith(f"{url}/x: ") for record in caplog.records)
    finally:
        server.shutdown()


def test_a_store_that_refuses_is_not_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    server = serve(type("Refusing", (Failing,), {"failures": 9, "status": 403}))
    try:
        with pytest.raises(StoreError, match=r"/x: .*403.*check the address and the credentials"):
            open_folder(f"http://127.0.0.1:{server.server_port}", SHORT).read("x")
        assert not caplog.records
    finally:
        server.shutdown()


@pytest.mark.parametrize("protocol", ["http", "s3"])
def test_a_store_that_stays_silent_is_an_error_and_not_a_hang(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        if protocol == "s3":
            for name, value in (("ENDPOINT_URL", place), ("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b")):
                monkeypatch.setenv(f"AWS_{name}", value)
            place = "s3://silent"
        patience = Patience(attempts=2, timeout=0.4, first_pause=0.01, longest_pause=0.02)
        with pytest.raises(StoreError, match=f"{place}/x did not answer in 2 attempts.*TESSERA_STORE_TIMEOUT"):
            open_folder(place, patience).read("x")


def test_unknown_and_missing_stores_are_named() -> None:
    with pytest.raises(StoreError, match=r"nonsense://x.*use a folder, s3://"):
        open_folder("nonsense://x")
    with pytest.raises(StoreError, match="gs://bucket/x needs gcsfs: pip install gcsfs"):
        open_folder("gs://bucket/x")


def test_a_bucket_that_does_not_exist_has_no_files(s3: str) -> None:
    folder = open_folder("s3://no-such-bucket/set", SHORT)
    assert list(folder.files()) == []
    assert folder.size("x") is None
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/set/x"):
        folder.read("x")


def test_patience_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESSERA_STORE_ATTEMPTS", "2")
    monkeypatch.setenv("TESSERA_STORE_TIMEOUT", "1.5")
    assert Patience.of_environment() == Patience(attempts=2, timeout=1.5)
    for value in ("0", "-1", "often", "nan"):
        monkeypatch.setenv("TESSERA_STORE_ATTEMPTS", value)
        with pytest.raises(ValueError, match=f"TESSERA_STORE_ATTEMPTS={value}: use a number above 0"):
            Patience.of_environment()


def test_a_full_disk_here_is_not_the_stores_fault() -> None:
    def write() -> None:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(OSError, match="No space left"):
        storage.patiently("s3://x/y", write, SHORT)
