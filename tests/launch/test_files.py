"""The files and commands for other systems are well formed and say what was asked."""

import shlex
import subprocess

import pytest
import yaml

from launch import files

OVERRIDES = ["data.path=/data/my speech", "batch.micro_batches=8"]


def test_sbatch_script_is_bash_and_carries_every_argument(tmp_path):
    script = files.sbatch_script("tiny", "speech/wav2vec2_tiny_knn", OVERRIDES, tmp_path / "run", 2, 4, "12:00:00")
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    subprocess.run(["bash", "-n", str(file)], check=True)
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in directives
    assert "#SBATCH --gpus-per-node=4" in directives
    assert "#SBATCH --time=12:00:00" in directives
    command = script[script.index("-m pipeline.training") :]
    assert shlex.split(command)[2:] == ["speech/wav2vec2_tiny_knn", *OVERRIDES, "--run-dir", str(tmp_path / "run")]


def test_ray_job_runs_the_same_launch_on_its_cluster(tmp_path):
    text = files.ray_job_manifest(
        "Tiny_KNN", "speech/wav2vec2_tiny_knn", OVERRIDES, tmp_path / "run", 2, 4, 3, "lab/tessera:1"
    )
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["metadata"]["name"] == "tiny-knn"
    workers = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    container = workers["template"]["spec"]["containers"][0]
    assert workers["replicas"] == 2
    assert container["image"] == "lab/tessera:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:3] == ["tessera", "launch", "speech/wav2vec2_tiny_knn"]
    assert set(OVERRIDES) < set(words)


def test_hostfile_is_checked_line_by_line(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# the cluster\nnode-a slots=4\nnode-b slots=2\n")
    assert files.read_hostfile(hosts, nodes=2, ranks_per_node=2) == hosts
    with pytest.raises(ValueError, match="node-b have fewer slots than --ranks-per-node 4"):
        files.read_hostfile(hosts, nodes=2, ranks_per_node=4)
    with pytest.raises(ValueError, match="lists 2 hosts, --nodes asks for 3"):
        files.read_hostfile(hosts, nodes=3, ranks_per_node=1)
    hosts.write_text("node-a 4\n")
    with pytest.raises(ValueError, match="line 1 is 'node-a 4': write `host slots=N`"):
        files.read_hostfile(hosts, nodes=1, ranks_per_node=1)
    with pytest.raises(ValueError, match="--hostfile is missing"):
        files.read_hostfile(None, nodes=1, ranks_per_node=1)
