"""What other systems need to start a run: an sbatch script, DeepSpeed's command line, a KubeRay RayJob.

Pure functions from values to text; nothing is started or written here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

MASTER_PORT = 29500


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
    """A Slurm job: one torchrun a node, requeued by Slurm when a node fails; each start resumes from the run folder."""
    arguments = shlex.join([recipe, *overrides, "--run-dir", str(run)])
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={ranks_per_node}
#SBATCH --time={time_limit}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={run}/slurm-%j.log

set -euo pipefail
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$(( SLURM_CPUS_ON_NODE / {ranks_per_node} ))
export NCCL_ASYNC_ERROR_HANDLING=1
srun --kill-on-bad-exit=1 python -m torch.distributed.run \\
    --nnodes={nodes} --nproc-per-node={ranks_per_node} --max-restarts=0 \\
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head_node:{MASTER_PORT}" \\
    -m pipeline.training {arguments}
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
    """A KubeRay RayJob: a cluster of ``nodes`` workers that lives as long as the run."""
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
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": {
                "headGroupSpec": {"rayStartParams": {}, "template": pod("ray-head", 0)},
                "workerGroupSpecs": [workers],
            },
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False)
