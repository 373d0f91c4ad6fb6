"""Ranks on several hosts, one of which loses the network. The hosts are namespaces: `tests/distributed/hosts.py`."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.cluster_check import bus_bandwidth
from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from tests.conftest import SMALL_IMAGE
from tests.distributed.hosts import Host, hosts, why_not

RECIPE = "image/autoencoder_tiny_ksom"
RANKS_PER_HOST = 2
DEADLINE = 300.0  # seconds for anything that is waited for
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
ENVIRONMENT["RAY_AUTH_MODE"] = "disabled"  # nobody else reaches the hosts
ENVIRONMENT["PYTHONPATH"] = str(Path(__file__).parents[2])

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())


def _overrides(dataset: Path, steps: int, timeout: int) -> list[str]:
    return [
        f"data.path={dataset}",
        *SMALL_IMAGE,
        "batch.micro_batches=4",
        f"training.steps={steps}",
        "training.checkpoint_every=5",
        f"training.collective_timeout={timeout}",
    ]


def _torchrun(every: list[Host], module: list[str], folder: Path, ranks: int) -> list[subprocess.Popen]:
    """torchrun on each host, the ranks meeting at the first's address."""
    first = [f"--master-addr={every[0].address}", "--master-port=29500", "--max-restarts=0"]
    started = []
    for host in every:
        nodes = [f"--nnodes={len(every)}", f"--node-rank={host.number - 1}", f"--nproc-per-node={ranks}"]
        command = [sys.executable, "-m", "torch.distributed.run", *nodes, *first, *module]
        started.append(host.start(command, folder / f"{host.name}.log", ENVIRONMENT))
    return started


def _ray_node(host: Host, folder: Path, *options: str) -> subprocess.Popen:
    """A Ray node that is started anew whenever it ends, as systemd or Kubernetes would."""
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    start += ["--object-store-memory=100000000", f"--node-ip-address={host.address}", *options]
    loop = f"while true; do {shlex.join(start)}; sleep 1; done"
    return host.start(["bash", "-c", loop], folder / f"{host.name}.log", ENVIRONMENT)


def _said(folder: Path) -> str:
    return "".join(f"--- {log.name}\n{log.read_text()[-3000:]}\n" for log in sorted(folder.glob("*.log")))


def _wait(what: str, condition, started: list[subprocess.Popen], folder: Path) -> None:
    """Until it holds, while all that was started runs."""
    until = time.monotonic() + DEADLINE
    while not condition():
        ended = [process.poll() for process in started if process.poll() is not None]
        assert not ended, f"{what} did not come, processes ended with {ended}\n{_said(folder)}"
        assert time.monotonic() < until, f"{what} did not come in {DEADLINE:g} s\n{_said(folder)}"
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_two_hosts_meet_measure_their_link_and_notice_its_loss(tmp_path):
    """A bare process group that chooses its interface and its timeouts as training does. Without the choice the ranks
    would offer one another 127.0.1.1."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import datetime, os, torch\n"
        "from torch import distributed\n"
        "from launch.cluster_probe import time_all_reduce\n"
        "from pipeline.training.interface import use_interface_towards\n"
        "use_interface_towards(os.environ['MASTER_ADDR'])\n"
        "distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=5))\n"
        "size = 2**22\n"
        "took = time_all_reduce(torch.device('cpu'), [size])[size]\n"
        "print('took', took, os.environ['GLOO_SOCKET_IFNAME'], flush=True)\n"
        "try:\n"
        "    while True:\n"
        "        distributed.all_reduce(torch.ones(1))\n"
        "except RuntimeError as error:\n"
        "    print('lost:', error, flush=True)\n"
        "    os._exit(1)\n"
    )
    megabits = 100
    with hosts(2, tmp_path) as both:
        both[1].slow_down(megabits)
        started = _torchrun(both, [str(script)], tmp_path, 1)
        logs = [tmp_path / f"{host.name}.log" for host in both]
        measured = re.compile(r"took (\S+) eth0\n")
        _wait("the time", lambda: all(measured.search(log.read_text()) for log in logs), started, tmp_path)
        both[1].cut_off()
        codes = [process.wait(DEADLINE) for process in started]
    for log, code in zip(logs, codes, strict=True):
        assert code == 1
        assert "lost: " in log.read_text()
        assert "imed out" in log.read_text()
        # The link carries this and no more, and TCP's and Ethernet's headers are a twentieth of it.
        share = bus_bandwidth(2, 2**22, float(measured.search(log.read_text())[1])) * 8 / (megabits * 1e6)
        assert 0.6 < share < 1.02, f"{share:.2f} of {megabits} Mbit/s"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_under_torchrun_ends_when_a_host_is_cut_off(image_dataset, tmp_path):
    run = Run(tmp_path / "run")
    module = ["-m", "pipeline.training", RECIPE, *_overrides(image_dataset, 5000, 10), "--run-dir", str(run.path)]
    with hosts(2, tmp_path) as both:
        started = _torchrun(both, module, tmp_path, RANKS_PER_HOST)
        _wait("a checkpoint", lambda: len(run.list_checkpoints()) > 0, started, tmp_path)
        both[1].cut_off()
        codes = [process.wait(DEADLINE) for process in started]
    assert codes == [1, 1]
    for number in (1, 2):
        words = (tmp_path / f"host{number}.log").read_text()
        assert f"on host{number} lost another rank" in words
        assert f"process {run.environment()['ranks'][0]['pid']} on host1" in words, "whom to look at"
    assert run.latest_checkpoint() is not None


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_ray_run_whose_host_is_cut_off_and_brought_back(image_dataset, tmp_path):
    """The host of rank 0, which holds the run folder and writes its checkpoints, loses the network and not the disk. It
    comes back when Ray has given it up."""
    steps = 80
    overrides = _overrides(image_dataset, steps, 30)
    undisturbed, run = Run(tmp_path / "undisturbed"), Run(tmp_path / "run")
    alone = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={2 * RANKS_PER_HOST}"]
    alone += ["-m", "pipeline.training", RECIPE, *overrides, "--run-dir", str(undisturbed.path)]
    subprocess.run(alone, env=os.environ | ENVIRONMENT, check=True, capture_output=True, timeout=2 * DEADLINE)

    with hosts(3, tmp_path) as [head, *nodes]:
        address = f"{head.address}:6379"
        _ray_node(head, tmp_path, "--head", "--port=6379", "--include-dashboard=false", "--num-cpus=0")
        for node in nodes:
            _ray_node(node, tmp_path, f"--address={address}", f"--num-cpus={RANKS_PER_HOST}")
        logs = {host: tmp_path / f"{host.name}.log" for host in (head, *nodes)}
        _wait("Ray", lambda: all("runtime started" in log.read_text() for log in logs.values()), [], tmp_path)
        launch = ["launch", RECIPE, *overrides, "--on", "ray", "--ray-address", address, "--run", str(run.path)]
        launch += ["--nodes", str(len(nodes)), "--ranks-per-node", str(RANKS_PER_HOST)]
        command = [sys.executable, "-c", "from launch.cli import main; main()", *launch]
        driver = head.start(command, tmp_path / "driver.log", ENVIRONMENT)
        _wait("a checkpoint", lambda: len(run.list_checkpoints()) > 0 and len(run.log()) > 6, [driver], tmp_path)
        ranks = run.environment()["ranks"]
        assert sorted(rank["host"] for rank in ranks) == ["host2", "host2", "host3", "host3"]
        [victim] = [node for node in nodes if node.name == ranks[0]["host"]]
        victim.cut_off()
        heard = tmp_path / "driver.log"
        _wait("Ray's notice", lambda: "has been marked dead" in heard.read_text(), [driver], tmp_path)
        assert run.log()[-1]["step"] < steps, "cut off in the middle"
        victim.bring_back()
        assert driver.wait(2 * DEADLINE) == 0, _said(tmp_path)

    log = run.log()
    attempts = [line["attempt"] for line in log]
    assert max(attempts) > 1
    assert attempts == sorted(attempts), "a start that was given up writes no more"
    losses = {line["step"]: line["loss"] for line in undisturbed.log()}
    for line in log:
        assert line["loss"] == losses[line["step"]], line
    expected, actual = (read_weights(each.latest_checkpoint()) for each in (undisturbed, run))
    assert run.latest_checkpoint().name == f"step-{steps:08d}"
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name
    assert not list(run.checkpoints.glob(".*")), "nothing half-made stays"
