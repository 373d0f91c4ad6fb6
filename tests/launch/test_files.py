"""The files and commands for other systems are well formed and say what was asked."""

import json
import shlex
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch import files

OVERRIDES = ["data.path=/data/my speech", "batch.micro_batches=8"]


def test_sbatch_script_is_bash_and_carries_every_argument(tmp_path):
    script = files.sbatch_script("tiny", "speech/wav2vec2_tiny", OVERRIDES, tmp_path / "run", 2, 4, "12:00:00")
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    subprocess.run(["bash", "-n", str(file)], check=True)
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --nodes=2" in directives
    assert "#SBATCH --ntasks-per-node=4" in directives
    assert "#SBATCH --gpus-per-node=4" in directives
    assert "#SBATCH --time=12:00:00" in directives
    assert "#SBATCH --signal=USR1@300" in directives, "not B: the ranks are to hear it"
    [command] = [line for line in script.splitlines() if "-m pipeline.training" in line]
    command = command[command.index("-m pipeline.training") :]
    assert shlex.split(command)[2:] == ["speech/wav2vec2_tiny", *OVERRIDES, "--run-dir", str(tmp_path / "run")]


def test_ray_job_runs_the_same_launch_on_its_cluster(tmp_path):
    text = files.ray_job_manifest(
        "Tiny_KNN", "speech/wav2vec2_tiny", OVERRIDES, tmp_path / "run", 2, 4, 3, "lab/tessera:1"
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
    assert words[:3] == ["tessera", "launch", "speech/wav2vec2_tiny"]
    assert set(OVERRIDES) < set(words)


def test_ray_job_is_what_kuberay_takes(tmp_path):
    """By the field names, types and requirements of its custom resource; a field it does not know it would drop."""
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    text = files.ray_job_manifest("tiny", "speech/wav2vec2_tiny", OVERRIDES, tmp_path / "run", 2, 4, 3, "lab/t:1")
    manifest = yaml.safe_load(text)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        jsonschema.validate(manifest, schema)
    with pytest.raises(ValueError, match="--run runs/a is relative"):
        files.ray_job_manifest("tiny", "speech/wav2vec2_tiny", [], Path("runs/a"), 1, 1, 0, "lab/t:1")


def test_deepspeed_takes_the_hostfile_command(tmp_path):
    """DeepSpeed's runner parses what we would start, and would start the trainer with these arguments."""
    from deepspeed.launcher import runner

    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=4\nnode-b slots=4\n")
    command = files.deepspeed_command(hosts, "speech/wav2vec2_tiny", OVERRIDES, tmp_path / "run", 2, 4)
    arguments = runner.parse_args(command[1:])
    assert (arguments.num_nodes, arguments.num_gpus, arguments.module) == (2, 4, True)
    assert dict(runner.fetch_hostfile(arguments.hostfile)) == {"node-a": 4, "node-b": 4}
    assert arguments.user_script == "pipeline.training"
    assert arguments.user_args == ["speech/wav2vec2_tiny", *OVERRIDES, "--run-dir", str(tmp_path / "run")]


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
