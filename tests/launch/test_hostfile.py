"""DeepSpeed's runner on real hosts: pdsh, ssh, and two sshd addresses of this machine."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.training.__main__ import share_cores
from pipeline.training.run_folder import Run
from pipeline.training.stop import RESUME_ME
from tests.conftest import IMAGE
from tests.data_prep.test_cluster import free_ports

STEPS = 40
HOSTS = ("127.0.0.2", "127.0.0.3")
PRIVILEGE_SEPARATION = Path("/run/sshd")
"""An empty folder that root's sshd insists on; Debian makes it when the service starts."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One in which `ssh` reaches both hosts, with a key and a configuration of its own."""
    programs = {name: shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("sshd", "ssh", "pdsh")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install openssh-server pdsh")
    folder = tmp_path_factory.mktemp("hosts")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    [port] = free_ports(1)
    (folder / "sshd_config").write_text(
        "".join(f"ListenAddress {host}:{port}\n" for host in HOSTS)
        + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        + f"AllowUsers {getpass.getuser()}\nPasswordAuthentication no\nStrictModes no\nUsePAM no\n"
    )
    (folder / "ssh_config").write_text(
        f"Port {port}\nIdentityFile {folder}/user\nIdentitiesOnly yes\nStrictHostKeyChecking no\n"
        "UserKnownHostsFile /dev/null\nLogLevel ERROR\n"
    )
    # ssh looks for its configuration where the password file says, not in $HOME.
    command = folder / "ssh"
    command.write_text(f'#!/bin/sh\nexec {programs["ssh"]} -F {folder}/ssh_config "$@"\n')
    command.chmod(0o755)
    values = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    with _privilege_separation(), (folder / "sshd.log").open("w") as log:
        sshd = subprocess.Popen([programs["sshd"], "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
        try:
            until = time.monotonic() + 60
            while subprocess.run([command, HOSTS[1], "true"], capture_output=True, check=False).returncode != 0:
                assert time.monotonic() < until, (folder / "sshd.log").read_text()
                time.sleep(0.2)
            yield values
        finally:
            for process in psutil.Process(sshd.pid).children(recursive=True):
                process.kill()
            sshd.kill()
            sshd.wait()


@contextmanager
def _privilege_separation():
    ours = os.getuid() == 0 and not PRIVILEGE_SEPARATION.exists()
    if ours:
        PRIVILEGE_SEPARATION.mkdir()
    try:
        yield
    finally:
        if ours:
            PRIVILEGE_SEPARATION.rmdir()


@contextmanager
def _launched(environment, dataset, run):
    """`tessera launch --on hostfile` on both hosts, a rank each; gives the process, and ends all that is left of it."""
    hosts = run.path.with_name("hosts")
    hosts.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    overrides = [f"data.path={dataset}", *IMAGE, f"training.steps={STEPS}", "training.log_every=1"]
    overrides += ["training.collective_timeout=60", "description=two hosts, $HOME & 'co'"]
    command = [sys.executable, "-m", "launch.cli", "launch", "image/autoencoder_tiny_ksom", *overrides]
    command += ["--on", "hostfile", "--hostfile", str(hosts), "--nodes", "2", "--run", str(run.path)]
    log = run.path.with_name("output")
    with log.open("a") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()
        for other in psutil.process_iter():  # the runner, pdsh, ssh, and the ranks and their launchers
            try:
                if other.pid != os.getpid() and any(str(run.path) in word for word in other.cmdline()):
                    other.kill()
            except psutil.Error:
                continue


def _wait_for_steps(run, process, log, attempt):
    until = time.monotonic() + 240
    while not (lines := run.log()) or lines[-1]["attempt"] != attempt:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_stops_the_hosts_and_the_same_command_goes_on(environment, image_dataset, tmp_path):
    run = Run(tmp_path / "a run")
    with _launched(environment, image_dataset, run) as (process, log):
        _wait_for_steps(run, process, log, attempt=1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(240) == RESUME_ME, log.read_text()
        assert "the same command goes on" in log.read_text()
    stopped_at = run.log()[-1]["step"]
    assert stopped_at < STEPS
    with _launched(environment, image_dataset, run) as (process, log):
        assert process.wait(400) == 0, log.read_text()
    assert [line["step"] for line in run.log()] == list(range(1, STEPS + 1)), "no step made twice: the stop saved"
    assert [rank["rank"] for rank in run.environment()["ranks"]] == [0, 1]
    assert run.recipe().description == "two hosts, $HOME & 'co'", "through two shells"
    assert run.latest_checkpoint().name == f"step-{STEPS:08d}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dead_rank_ends_the_run_on_all_hosts(environment, image_dataset, tmp_path):
    run = Run(tmp_path / "run")
    with _launched(environment, image_dataset, run) as (process, log):
        _wait_for_steps(run, process, log, attempt=1)
        left, dead = (rank["pid"] for rank in run.environment()["ranks"])
        os.kill(dead, signal.SIGKILL)
        assert process.wait(240) not in (0, RESUME_ME)
        told = log.read_text()
        assert f"{HOSTS[1]}: ssh exited with exit code" in told
        assert f"process {dead}" in told, "the other rank says whom it lost"
        assert not psutil.pid_exists(left)


def test_each_rank_of_a_host_takes_its_part_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    share_cores()
    assert "OMP_NUM_THREADS" not in os.environ, "not DeepSpeed's launcher"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    monkeypatch.setenv("LOCAL_SIZE", "2")
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("LOCAL_SIZE", "16")
    share_cores()
    assert os.environ["OMP_NUM_THREADS"] == "4", "what was asked for stays"
