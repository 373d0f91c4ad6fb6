"""Preparation on a Ray cluster of several nodes, real ones on this machine, that die."""

from __future__ import annotations

import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep import verify
from tests.data_prep.processes import GCS, RAY_WORKER, RAYLET, Session, session
from tests.data_prep.test_interruption import command, leftovers, records, wait_until
from tests.data_prep.test_preparation import digests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Cluster:
    """A head that runs no tasks, and two nodes with a CPU each."""

    address: str
    head: Session
    nodes: list[Session]


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def ray_node(folder: Path, name: str, *options: str) -> Iterator[Session]:
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    agent, metrics = free_ports(2)
    ports = [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}"]
    memory = "--object-store-memory=100000000"
    for attempt in range(3):  # Ray gives itself 30 s, which a busy machine may need
        with session([*start, memory, *ports, *options], folder / f"{name}-{attempt}.log") as running:
            while running.process.poll() is None and "Ray runtime started" not in running.output():
                time.sleep(0.1)
            if running.process.poll() is None:
                yield running
                return
    raise AssertionError(running.output())


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    port, client = free_ports(2)
    address = f"127.0.0.1:{port}"
    head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
    with ExitStack() as stack:
        # Unix sockets need a short path.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        head += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--num-cpus=0"]
        started = stack.enter_context(ray_node(tmp_path, "head", *head))
        nodes = []
        for number in range(2):
            node = ["--node-ip-address=127.0.0.1", f"--address={address}", "--num-cpus=1"]
            nodes.append(stack.enter_context(ray_node(tmp_path, f"node-{number}", *node)))
        yield Cluster(address, started, nodes)


def test_a_node_that_dies_and_then_the_head(
    cluster: Cluster, speech_source: Path, speech_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare = command(speech_source, out, "--ray-address", cluster.address, shard_bytes=60_000)
    with session(prepare, tmp_path / "first.log") as running:
        wait_until(lambda: len(records(out)) >= 5, running)
        wait_until(lambda: bool(cluster.nodes[0].processes(RAY_WORKER)), running)
        assert cluster.nodes[0].kill(RAYLET)
        seen = len(records(out))
        wait_until(lambda: len(records(out)) >= seen + 10, running)  # the other node goes on
        assert cluster.head.kill(GCS)
        assert running.process.wait(120) == 2
        assert "error: Ray is gone, its " in running.output()
        assert "repeat the command" in running.output()
    assert leftovers(out) == []
    seen = len(records(out))
    with session(command(speech_source, out, shard_bytes=60_000), tmp_path / "second.log") as running:
        assert running.process.wait(200) == 0, running.output()
        assert f"{seen} shards were finished before" in running.output()
    assert verify(out) == []


def test_a_cluster_that_loses_a_node_makes_the_same_bytes(
    cluster: Cluster, speech_source: Path, speech_dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare = command(speech_source, out, "--ray-address", cluster.address, shard_bytes=1_000_000)
    with session(prepare, tmp_path / "log") as running:
        wait_until(lambda: bool(cluster.nodes[0].processes(RAY_WORKER)), running)
        assert cluster.nodes[0].kill(RAYLET)
        assert running.process.wait(200) == 0, running.output()
    assert digests(out) == digests(speech_dataset)
