"""Several hosts on one machine, as near to real ones as Linux makes them without a hypervisor.

In: how many. Out: hosts on one network, each with a name, an address, processes, shared memory, `/etc/hosts` and
`/tmp/ray` of its own, whose cables can be pulled, plugged in again and made slow. They share the other files, as the
hosts of a cluster share a network drive. Needs root and iproute2; :func:`why_not` says what is missing. Leaves
nothing: a host is the namespaces of one process that ends with the test, and the kernel ends everything in them with
it, even after a SIGKILL.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NETWORK = "10.213.7"
_NEEDED = ("unshare", "nsenter", "ip", "tc", "mount", "hostname")
# The first process of a host's namespaces: bash, for it buries the processes that lose their parents.
_HOST = """
set -e
mount --make-rprivate /
mount --bind {hosts} /etc/hosts
[ ! -e /etc/resolv.conf ] || mount --bind /dev/null /etc/resolv.conf  # no name server can be asked: don't wait for it
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs tmpfs /tmp/ray
hostname {name}
ip link set lo up
echo ready
read || true
"""


def why_not() -> str:
    """What keeps this machine from making hosts, or nothing."""
    missing = [program for program in _NEEDED if shutil.which(program) is None]
    if missing:
        return f"hosts need the programs {', '.join(missing)}: apt-get install iproute2 util-linux"
    # One try says more than any list of capabilities; the interfaces go with their namespace.
    attempt = "ip link add x1 type veth peer name x2 && ip link add x3 type bridge && mount -t tmpfs x /dev/shm"
    command = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", attempt]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"this machine allows no network namespaces: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True)
class Host:
    """One of the hosts. ``number`` counts from 1."""

    number: int
    first_process: int
    """Its process number as the test sees it."""
    switch: int
    """The process whose network namespace has the bridge."""

    @property
    def name(self) -> str:
        return f"host{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    def command(self, *words: str) -> list[str]:
        """The command that runs ``words`` on this host."""
        return ["nsenter", f"--target={self.first_process}", "--all", f"--wd={Path.cwd()}", "--", *words]

    def start(self, words: list[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """Start ``words`` on this host, with its output in ``log``. The process ends with the host at the latest."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(*words),
                env=os.environ | dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def cut_off(self) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        _in_network_of(self.switch, f"ip link set port{self.number} down")

    def bring_back(self) -> None:
        """Plug it in again."""
        _in_network_of(self.switch, f"ip link set port{self.number} up")

    def slow_down(self, megabits: float) -> None:
        """So many megabits a second leave this host, and so many reach it."""
        rule = f"root tbf rate {megabits:g}mbit burst 64kb latency 200ms"
        _in_network_of(self.first_process, f"tc qdisc replace dev eth0 {rule}")
        _in_network_of(self.switch, f"tc qdisc replace dev port{self.number} {rule}")


@contextmanager
def hosts(number: int, folder: Path) -> Iterator[list[Host]]:
    """So many hosts on one network, for the block. ``folder`` is for their files.

    Their `/etc/hosts` name each by its address, but every host itself by 127.0.1.1, as Debian installs it: what asks
    for its own name learns no address that others can reach.
    """
    with ExitStack() as stack:
        switch = stack.enter_context(_process_of_namespaces("ip link set lo up; echo ready; read", ["--net"]))
        _in_network_of(switch, "ip link add bridge type bridge", "ip link set bridge up")
        made = []
        for place in range(1, number + 1):
            names = folder / f"hosts-of-host{place}"
            others = [f"{NETWORK}.{other} host{other}" for other in range(1, number + 1) if other != place]
            names.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 host{place}", *others]) + "\n")
            script = _HOST.format(hosts=shlex.quote(str(names)), name=f"host{place}")
            own = ["--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc"]
            first = stack.enter_context(_process_of_namespaces(script, own))
            _in_network_of(
                switch,
                f"ip link add port{place} type veth peer name eth0 netns {first}",
                f"ip link set port{place} master bridge up",
            )
            _in_network_of(first, f"ip address add {NETWORK}.{place}/24 dev eth0", "ip link set eth0 up")
            made.append(Host(place, first, switch))
        yield made


@contextmanager
def _process_of_namespaces(script: str, namespaces: list[str]) -> Iterator[int]:
    """A bash in new namespaces that has run ``script`` as far as "ready" and ends when its input does."""
    command = ["unshare", *namespaces, "--fork", "--kill-child", "bash", "-c", script]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"no namespaces: {shlex.join(command)} ended with {process.wait()}")
        [child] = psutil.Process(process.pid).children()
        yield child.pid
    finally:
        process.kill()  # its child goes with it, and what is in the namespaces with that
        process.wait()


def _in_network_of(process: int, *commands: str) -> None:
    for command in commands:
        entered = ["nsenter", f"--target={process}", "--net", "--", *shlex.split(command)]
        done = subprocess.run(entered, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command}: {done.stderr.strip()}")
