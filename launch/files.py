"""What other systems need to start a run: an sbatch script, DeepSpeed's command line, a KubeRay RayJob.

Pure functions from values to text; nothing is started or written here.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pipeline.training.stop import RESUME_ME

SECONDS_TO_SAVE = 300
"""How long before the end of a job's time Slurm tells the ranks to save; it may do so a minute earlier (sbatch(1))."""
SECONDS_ALONE = 60
"""How long Slurm lets the other ranks run on after one has ended."""
SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""No question that nobody answers; a host that has been silent for a minute is given up."""
CLAIM = "tessera"
"""The persistent volume claim that the pods mount."""
PORTS = range(20000, 32000)
"""For the ranks' first meeting: below those that Linux gives to outgoing connections."""


@dataclass(frozen=True)
class Job:
    """What to train, where to and on how many ranks: the same for every system."""

    name: str
    recipe: str
    overrides: Sequence[str]
    run: Path
    """Absolute."""
    nodes: int
    ranks_per_node: int
    gpus: bool = True
    """Ask for a GPU a rank; ranks on CPUs otherwise."""

    @property
    def trainer_arguments(self) -> list[str]:
        """What `python -m pipeline.training` is given."""
        return [self.recipe, *self.overrides, "--run-dir", str(self.run)]


def read_hostfile(file: Path | None, nodes: int, ranks_per_node: int) -> Path:
    """Check DeepSpeed's hostfile (`host slots=N` a line) against the wanted nodes; returns its path.

    Raises ValueError naming the line that is wrong, or what is missing.
    """
    if file is None or not file.is_file():
        what = "--hostfile is missing" if file is None else f"--hostfile {file} is no file"
        raise ValueError(f"{what}: give a file with one `host slots=N` a line")
    slots: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not match:
            raise ValueError(f"{file} line {number} is {line!r}: write `host slots=N`")
        if match[1] in slots:
            raise ValueError(f"{file} line {number}: {match[1]} is listed twice: give its slots in one line")
        slots[match[1]] = int(match[2])
    if len(slots) < nodes:
        raise ValueError(
            f"{file} lists {len(slots)} hosts, --nodes asks for {nodes}: list more hosts or use --nodes {len(slots)}"
        )
    small = [host for host, count in slots.items() if count < ranks_per_node]
    if small:
        raise ValueError(f"{file}: {', '.join(small)} have fewer slots than --ranks-per-node {ranks_per_node}")
    return file


def deepspeed_command(job: Job, hostfile: Path) -> list[str]:
    """DeepSpeed's own runner, which starts the ranks over pdsh and ssh, with this Python and in this folder."""
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "warning"),
        # Without --force_multi it would start the ranks of a single node here, whatever host the file names.
        *("--hostfile", str(hostfile.absolute()), "--force_multi"),
        *("--num_nodes", str(job.nodes), "--num_gpus", str(job.ranks_per_node)),
        *("--master_port", str(PORTS[zlib.crc32(str(job.run).encode()) % len(PORTS)])),  # one a run
        *("--module", "pipeline.training", *map(_for_remote_shell, job.trainer_arguments)),
    ]


def _for_remote_shell(word: str) -> str:
    """``word`` so that it comes out of pdsh and the hosts' shells as it went in.

    DeepSpeed puts double quotes around words with a space, escapes those within, and leaves all else to the shells;
    pdsh replaces %h, %n and %u.
    """
    word = word.replace("%", "%%")
    return re.sub(r"([$`\\])", r"\\\1", word) if " " in word else shlex.quote(word)


def sbatch_script(job: Job, time_limit: str, options: Sequence[str] = ()) -> str:
    """A Slurm job whose tasks are the ranks, so that signals and exit codes pass nobody in between.

    Ahead of the time limit Slurm sends the ranks SIGUSR1; they save and end with :data:`RESUME_ME`, and the script puts
    the job back into the queue, as Slurm itself does when a node fails. Each start goes on from the run folder.
    ``options`` are further ones of sbatch, `name=value`, and win over ours. Raises ValueError for a time limit that
    sbatch does not take or that leaves no time to train, and for what is no option.
    """
    _check_time_limit(time_limit)
    directives = {
        "job-name": job.name,
        "nodes": str(job.nodes),
        "ntasks-per-node": str(job.ranks_per_node),
        "gpus-per-node": str(job.ranks_per_node),
        "time": time_limit,
        "signal": f"USR1@{SECONDS_TO_SAVE}",
        "requeue": "",
        "open-mode": "append",
        "output": f"{str(job.run).replace('%', '%%')}/slurm-%j.log",
    }
    if not job.gpus:
        del directives["gpus-per-node"]
    for option in options:
        match = re.fullmatch(r"(?:--)?([a-z][a-z-]*)(?:=(.+))?", option)
        if not match:
            raise ValueError(f"--sbatch {option!r}: write an option of sbatch, such as --sbatch partition=long")
        directives[match[1]] = match[2] or ""
    lines = "\n".join(
        f"#SBATCH --{name}" + (f"={_quoted(value)}" if value else "") for name, value in directives.items()
    )
    trainer = shlex.join([sys.executable, "-m", "pipeline.training", *job.trainer_arguments])
    return f"""#!/bin/bash
{lines}

set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$(( {PORTS.start} + SLURM_JOB_ID % {len(PORTS)} ))  # jobs that share a node need one each
threads=$(( SLURM_CPUS_ON_NODE / {job.ranks_per_node} ))
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then
    threads=$SLURM_CPUS_PER_TASK
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # from 22.05 on srun does not take it over
fi
export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))

# A rank's bad end must not kill the others: on a stop each ends by itself with code {RESUME_ME}.
srun --kill-on-bad-exit=0 --wait={SECONDS_ALONE} bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec "$@"' rank {trainer}
code=$?
if [ "$code" -eq {RESUME_ME} ]; then
    echo "stopped and saved; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def _check_time_limit(time_limit: str) -> None:
    match = re.fullmatch(r"(?:(\d+)-(?=\d))?(\d+)(?::(\d+))?(?::(\d+))?", time_limit)
    if not match:
        raise ValueError(
            f"--time-limit {time_limit!r}: write minutes, hours:minutes:seconds or days-hours, or 0 for none"
        )
    days, *rest = (int(part or 0) for part in match.groups())
    hours, minutes, seconds = rest if match[1] or match[4] else (0, *rest[:2])
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if 0 < total < 2 * SECONDS_TO_SAVE:
        raise ValueError(
            f"--time-limit {time_limit} is {total} seconds, and the ranks save {SECONDS_TO_SAVE} seconds ahead of the "
            f"end: use {2 * SECONDS_TO_SAVE // 60} minutes or more"
        )


def _quoted(value: str) -> str:
    """For a line that begins with #SBATCH, of which Slurm reads quotes and backslashes as a shell would."""
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def ray_job_manifest(job: Job, shared: Sequence[Path], failures: int, image: str) -> str:
    """A KubeRay RayJob: a cluster of ``job.nodes`` workers that lives as long as the run.

    ``shared`` are the paths that the pods read and write: the volume is mounted where they begin to differ. Ray Train
    replaces dead workers; when the cluster's head dies or the run ends with an error, KubeRay makes a new cluster,
    which goes on from the run folder. Raises ValueError for a relative path, which no pod would find, and for paths
    that have no folder in common.
    """
    for path in shared:
        if not path.is_absolute():
            raise ValueError(f"{path} is relative: give its whole path on the volume that the pods mount")
    mount = os.path.commonpath([job.run.parent, *shared])
    if mount == "/":
        raise ValueError(
            f"{' and '.join(map(str, shared))} share no folder that a volume could be mounted at: put them on one "
            "volume, under one path"
        )
    command = shlex.join(
        [
            *("tessera", "launch", job.recipe, *job.overrides, "--on", "ray", "--ray-address", "auto"),
            *("--run", str(job.run), "--nodes", str(job.nodes), "--ranks-per-node", str(job.ranks_per_node)),
            *("--failures", str(failures)),
        ]
    )

    def pod(role: str, ranks: int) -> dict:
        resources = {"cpu": str(max(2, 4 * ranks)), "memory": f"{max(8, 32 * ranks)}Gi"}
        if ranks and job.gpus:
            resources["nvidia.com/gpu"] = str(ranks)
        container = {
            "name": role,
            "image": image,
            "resources": {"limits": resources, "requests": dict(resources)},
            "volumeMounts": [{"name": "shared", "mountPath": mount}],
        }
        claim = {"name": "shared", "persistentVolumeClaim": {"claimName": CLAIM}}
        return {"spec": {"containers": [container], "volumes": [claim]}}

    workers = {
        "groupName": "workers",
        "replicas": job.nodes,
        "minReplicas": job.nodes,
        "maxReplicas": job.nodes,
        "rayStartParams": {},
        "template": pod("ray-worker", job.ranks_per_node),
    }
    # No ranks on the head, which has no GPU and little memory.
    head = {"rayStartParams": {"num-cpus": "0"}, "template": pod("ray-head", 0)}
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        # Kubernetes adds five characters for each launch; KubeRay takes a DNS label of at most 47.
        "metadata": {"generateName": f"tessera-{re.sub('[^a-z0-9]+', '-', job.name.lower())[:33].strip('-')}-"},
        "spec": {
            "entrypoint": command,
            "backoffLimit": failures,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {"headGroupSpec": head, "workerGroupSpecs": [workers]},
        },
    }
    note = f"# The volume of the claim `{CLAIM}` is mounted at {mount} in every pod.\n"
    return note + yaml.safe_dump(manifest, sort_keys=False, width=1000)
