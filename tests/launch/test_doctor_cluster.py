"""`tessera doctor --cluster`: what it concludes, and what it finds on a real cluster of two nodes and a lost one."""

import os
import re
import subprocess
import sys
import tempfile
from contextlib import ExitStack

import pytest

from launch.cluster_check import (
    bus_bandwidth,
    check_cluster,
    compare_versions,
    judge_all_reduce,
    judge_clock,
    measure_clock,
)
from tests.data_prep.processes import RAYLET, session
from tests.data_prep.test_cluster import free_ports, ray_node

COMMAND = [sys.executable, "-c", "from launch.cli import main; main()", "doctor", "--cluster"]


def test_the_shortest_round_trip_tells_the_skew():
    now = [100.0]
    delays = iter([(0.5, 0.0), (0.01, 0.03)] + [(0.2, 0.2)] * 40)  # there, back

    def remote():
        there, back = next(delays)
        now[0] += there
        answer = now[0] + 7.0  # its clock is 7 s ahead
        now[0] += back
        return answer

    ahead, uncertainty = measure_clock(remote, lambda: now[0])
    assert uncertainty == pytest.approx(0.02)
    assert abs(ahead - 7.0) <= uncertainty


@pytest.mark.parametrize(
    ("ahead", "uncertainty", "state"),
    [(0.2, 0.01, "ok"), (-0.2, 0.01, "ok"), (3.0, 2.5, "ok"), (3.0, 0.1, "notice"), (-90.0, 1.0, "problem")],
)
def test_clocks_are_judged_by_what_is_sure(ahead, uncertainty, state):
    finding = judge_clock("10.0.0.2", ahead, uncertainty)
    assert finding.state == state
    assert f"± {uncertainty:.3f} s" in finding.detail
    assert bool(finding.advice) == (state != "ok")


def test_versions_that_differ_are_named_with_their_nodes():
    same = {"a": {"torch": "2.9.1", "ray": "2.60"}, "b": {"torch": "2.9.1", "ray": "2.60"}}
    assert compare_versions(same).state == "ok"
    other = same | {"c": {"torch": "2.8.0"}}
    finding = compare_versions(other)
    assert finding.state == "problem"
    assert "torch 2.9.1 on a b, 2.8.0 on c" in finding.detail
    assert "ray 2.60 on a b, missing on c" in finding.detail


def test_bus_bandwidth_is_that_of_nccl_tests():
    # Their text's example of the factor: 2(n-1)/n, 1 for two ranks and nearly 2 for many.
    assert bus_bandwidth(2, 100, 1.0) == 100
    assert bus_bandwidth(4, 100, 1.0) == 150
    assert bus_bandwidth(1000, 100, 2.0) == pytest.approx(99.9)


def test_a_slow_network_is_a_notice_with_its_price():
    assert judge_all_reduce("x", 2, {2**20: 0.001}).state == "ok"
    finding = judge_all_reduce("x", 2, {2**10: 0.01, 2**20: 0.1})
    assert finding.state == "notice"
    assert "10 MB/s (0.08 Gbit/s)" in finding.detail
    assert "38 s a step" in finding.advice


def test_no_cluster_is_a_problem():
    done = subprocess.run([*COMMAND, "--ray-address", "127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "no Ray cluster answers at 127.0.0.1:1" in " ".join(done.stdout.split())


def test_a_cluster_of_this_machine(ray_cluster, tmp_path):
    findings = {finding.name: finding for finding in check_cluster(None, str(tmp_path), ranks_per_node=2)}
    assert findings["versions"].state == "ok"
    [clock] = [finding for name, finding in findings.items() if name.startswith("clock ")]
    assert clock.state == "ok", "the same clock"
    [machine] = [finding for name, finding in findings.items() if name.endswith(f"({os.uname().nodename})")]
    assert "GiB free" in machine.detail
    assert findings["all-reduce between ranks"].state in ("ok", "notice")
    assert findings["all-reduce between ranks"].detail.startswith("2 ranks, ")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nodes_that_differ_and_one_that_is_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # else it depends on a token in the home folder
    other = tmp_path / "other" / "numpy-0.0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 0.0.1\n")
    port, client = free_ports(2)
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        # Unix sockets need a short path.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True))
        head = ["--head", f"--port={port}", f"--ray-client-server-port={client}", "--include-dashboard=false"]
        head += ["--node-ip-address=127.0.0.1", f"--temp-dir={folder}", "--num-cpus=0"]
        stack.enter_context(ray_node(tmp_path, "head", *head))
        nodes = {}
        for place, path in {2: "", 3: str(other.parent), 4: ""}.items():
            options = [f"--node-ip-address=127.0.0.{place}", f"--address={address}", "--num-cpus=1"]
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("PYTHONPATH", path)
                nodes[place] = stack.enter_context(ray_node(tmp_path, f"node-{place}", *options))
        assert nodes[2].kill(RAYLET)
        with session([*COMMAND, "--ray-address", address], tmp_path / "log") as running:
            assert running.process.wait(600) == 1
            said = " ".join(running.output().split())
    assert "differ between nodes: numpy" in said
    assert re.search(r"0\.0\.1 on 127\.0\.0\.3\b", said)
    assert "127.0.0.2" in said, "lost, or silent"
    assert re.search(r"all-reduce between nodes (2|the 3) ranks", said), said
