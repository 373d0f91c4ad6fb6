"""A Slurm of two nodes that are both this machine: munge, a controller and two node daemons of the user's own.

In: an empty folder. Out: the cluster, and an environment in which Slurm's commands speak to it. On the way out every
process of it is gone, those of its jobs too.
"""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.data_prep.test_cluster import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# Node names that resolve on every Linux. A GPU each, in name: nobody opens it. More cores than there may be, for jobs
# side by side.
CONFIGURATION = """\
ClusterName=tessera
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
NodeName=127.0.0.2 NodeHostname=localhost NodeAddr=127.0.0.2 Port={ports[1]} CPUs=4 Gres=gpu:1
NodeName=127.0.0.3 NodeHostname=localhost NodeAddr=127.0.0.3 Port={ports[2]} CPUs=4 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES
"""


class Slurm:
    """A running cluster; ``environment`` is for processes that submit to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def __call__(self, *command: str, fails: bool = False) -> str:
        """Run one of Slurm's commands; returns what it said. One that has to fail must."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job, by its own names, such as JobState, Restarts and ExitCode."""
        words = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, number: str, state: str, restarts: int = 0, seconds: float = 240) -> None:
        """Until the job is in ``state`` after so many restarts; an end in another one is an error at once."""
        until = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] != state or int(job["Restarts"]) != restarts:
            assert job["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), job
            assert time.monotonic() < until, job
            time.sleep(0.2)

    def start_again(self, number: str, *settings: str) -> None:
        """Start a requeued job, which Slurm lets wait for two minutes, with other ``settings``.

        Not before all of its last start has gone: Slurm would take that one's end for the new one's.
        """
        until = time.monotonic() + 60
        while any(f"[{number}." in " ".join(step.cmdline()) for step in self._steps()):
            assert time.monotonic() < until, "a step of the job's last start does not end"
            time.sleep(0.2)
        self("scontrol", "update", f"JobId={number}", "StartTime=now", *settings)

    def kill_processes(self) -> None:
        """Kill the daemons and all that came of them: daemons and jobs have the configuration in their environment."""
        steps = self._steps()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process in steps or process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    process.kill()

    def _steps(self) -> list[psutil.Process]:
        """The daemons of the jobs' steps, which overwrite their environment: known by a socket in the folder."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name().startswith("slurmstepd"):
                    sockets = [socket.laddr for socket in process.connections("unix")]
                    found += [process] * any(name.startswith(str(self.folder)) for name in sockets)
        return found


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Slurm]:
    """A cluster in ``folder``. Skips the test where Slurm or munge is not installed."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    for name in ("state", "spool-127.0.0.2", "spool-127.0.0.3"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, user=getpass.getuser(), ports=free_ports(3)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    slurm = Slurm(folder)
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "seed", "log")]
    with ExitStack() as stack:
        stack.callback(slurm.kill_processes)
        _start(stack, slurm, *munge)
        _wait(slurm, lambda: (folder / "munge.socket").exists())
        _start(stack, slurm, "slurmctld", "-D", "-i")
        for node in ("127.0.0.2", "127.0.0.3"):
            _start(stack, slurm, "slurmd", "-D", "-N", node)
        _wait(slurm, lambda: slurm("sinfo", "--noheader", "-o", "%D %t") == "2 idle\n")
        yield slurm


def _start(stack: ExitStack, slurm: Slurm, *command: str) -> None:
    log = stack.enter_context((slurm.folder / "daemons.log").open("a"))
    process = subprocess.Popen(command, env=slurm.environment, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.kill)


def _wait(slurm: Slurm, done: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while True:
        with suppress(AssertionError):  # of a command whose daemon is not there yet
            if done():
                return
        assert time.monotonic() < until, (slurm.folder / "daemons.log").read_text()
        time.sleep(0.1)
