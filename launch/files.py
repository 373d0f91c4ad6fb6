"""What other systems need to start a run: an sbatch script, DeepSpeed's command line, a KubeRay RayJob.

Pure functions from values to text; nothing is started or written here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from pipeline.training.stop import RESUME_ME

MASTER_PORT = 29500
SECONDS_TO_SAVE = 300
"""How long before the end of a job's time Slurm tells the ranks to save."""
SECONDS_ALONE = 60
"""How long Slurm lets the other ranks run on after one has ended."""


def read_hostfile(file: Path | None, nodes: int, ranks_per_node: int) -> Path:
    """Check DeepSpeed's hostfile (`host slots=N` a line) against the wanted nodes; returns its path.

    Raises ValueError naming the line that is wrong, or what is missing.
    """
    if file is None:
        raise ValueError("--hostfile is missing: give a file with one `host slots=N` a line")
    slots = {}
    for number, line in enumerate(file.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)", text)
        if not match:
            raise ValueError(f"{file} line {number} is {line!r}: write `host slots=N`")
        slots[match[1]] = int(match[2])
    if len(slots) < nodes:
        raise ValueError(
            f"{file} lists {len(slots)} hosts, --nodes asks for {nodes}: list more hosts or use --nodes {len(slots)}"
        )
    small = [host for host, count in slots.items() if count < ranks_per_node]
    if small:
        raise ValueError(f"{file}: {', '.join(small)} have fewer slots than --ranks-per-node {ranks_per_node}")
    return file


def deepspeed_command(
    hostfile: Path, recipe: str, overrides: Sequence[str], run: Path, nodes: int, ranks_per_node: int
) -> list[str]:
    """DeepSpeed's own runner, which starts the ranks over pdsh or ssh."""
    return [
        *("deepspeed", "--hostfile", str(hostfile), "--num_nodes", str(nodes), "--num_gpus", str(ranks_per_node)),
        *("--master_port", str(MASTER_PORT), "--module", "pipeline.training"),
        *(recipe, *overrides, "--run-dir", str(run)),
    ]


def sbatch_script(
    name: str, recipe: str, overrides: Sequence[str], run: Path, nodes: int, ranks_per_node: int, time_limit: str
) -> str:
    """A Slurm job whose tasks are the ranks, so that signals and exit codes pass nobody in between.

    Ahead of the time limit Slurm sends the ranks SIGUSR1; they save and end with :data:`RESUME_ME`, and the script puts
    the job back into the queue, as Slurm itself does when a node fails. Each start goes on from the run folder.
    """
    arguments = shlex.join([recipe, *overrides, "--run-dir", str(run)])
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={ranks_per_node}
#SBATCH --gpus-per-node={ranks_per_node}
#SBATCH --time={time_limit}
#SBATCH --signal=USR1@{SECONDS_TO_SAVE}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={run}/slurm-%j.log

set -uo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export MASTER_PORT=$(( 20000 + SLURM_JOB_ID % 20000 ))  # jobs that share a node need one each
threads=$(( SLURM_CPUS_ON_NODE / {ranks_per_node} ))
export OMP_NUM_THREADS=$(( threads > 0 ? threads : 1 ))

# A rank's bad end must not kill the others: on a stop each ends by itself with code {RESUME_ME}.
srun --kill-on-bad-exit=0 --wait={SECONDS_ALONE} bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    exec "$@"' rank python -m pipeline.training {arguments}
code=$?
if [ "$code" -eq {RESUME_ME} ]; then
    echo "stopped and saved; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def ray_job_manifest(
    name: str,
    recipe: str,
    overrides: Sequence[str],
    run: Path,
    nodes: int,
    ranks_per_node: int,
    failures: int,
    image: str,
) -> str:
    """A KubeRay RayJob: a cluster of ``nodes`` workers that lives as long as the run.

    Ray Train replaces dead workers; when the cluster's head dies or the run ends with an error, KubeRay makes a new
    cluster, which goes on from the run folder. Raises ValueError for a relative ``run``, which no pod would find.
    """
    if not run.is_absolute():
        raise ValueError(f"--run {run} is relative: give the folder's whole path on the volume that the pods mount")
    command = shlex.join(
        [
            *("tessera", "launch", recipe, *overrides, "--on", "ray", "--ray-address", "auto", "--run", str(run)),
            *("--nodes", str(nodes), "--ranks-per-node", str(ranks_per_node), "--failures", str(failures)),
        ]
    )

    def pod(role: str, gpus: int) -> dict:
        resources = {"cpu": str(max(2, 4 * gpus)), "memory": f"{max(8, 32 * gpus)}Gi"}
        if gpus:
            resources["nvidia.com/gpu"] = str(gpus)
        container = {
            "name": role,
            "image": image,
            "resources": {"limits": resources, "requests": resources},
            "volumeMounts": [{"name": "shared", "mountPath": str(run.parent)}],
        }
        claim = {"name": "shared", "persistentVolumeClaim": {"claimName": "tessera"}}
        return {"spec": {"containers": [container], "volumes": [claim]}}

    workers = {
        "groupName": "workers",
        "replicas": nodes,
        "minReplicas": nodes,
        "maxReplicas": nodes,
        "rayStartParams": {},
        "template": pod("ray-worker", ranks_per_node),
    }
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")},
        "spec": {
            "entrypoint": command,
            "backoffLimit": failures,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "headGroupSpec": {"rayStartParams": {}, "template": pod("ray-head", 0)},
                "workerGroupSpecs": [workers],
            },
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False)
