"""The files and commands for other systems are well formed and say what was asked."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from launch import files

OVERRIDES = ["data.path=/data/my $peech", "batch.micro_batches=8", "quantizer.grid=[4,3]", "description=it's 5%h"]


def _job(folder, **other):
    values = {"name": "tiny", "recipe": "speech/wav2vec2_tiny", "overrides": OVERRIDES, "run": folder / "run"}
    return files.Job(**(values | {"nodes": 2, "ranks_per_node": 4} | other))


def _directives(script):
    return [line for line in script.splitlines() if line.startswith("#SBATCH")]


def test_sbatch_script_is_bash_and_carries_every_argument(tmp_path):
    script = files.sbatch_script(_job(tmp_path), "12:00:00")
    file = tmp_path / "job.sbatch"
    file.write_text(script)
    subprocess.run(["bash", "-n", str(file)], check=True)
    directives = _directives(script)
    assert "#SBATCH --nodes=2" in directives
    assert "#SBATCH --ntasks-per-node=4" in directives
    assert "#SBATCH --gpus-per-node=4" in directives
    assert "#SBATCH --time=12:00:00" in directives
    assert "#SBATCH --signal=USR1@300" in directives, "not B: the ranks are to hear it"
    [command] = [line for line in script.splitlines() if "-m pipeline.training" in line]
    words = shlex.split(command.partition(" rank ")[2])
    trainer = [sys.executable, "-m", "pipeline.training", "speech/wav2vec2_tiny"]
    assert words == [*trainer, *OVERRIDES, "--run-dir", str(tmp_path / "run")]


def test_sbatch_options_win_over_ours(tmp_path):
    script = files.sbatch_script(_job(tmp_path, gpus=False), "0", ["partition=long", "--time=2-0", "exclusive"])
    directives = _directives(script)
    assert {"#SBATCH --partition=long", "#SBATCH --time=2-0", "#SBATCH --exclusive"} < set(directives)
    assert not [line for line in directives if "gpu" in line or line == "#SBATCH --time=0"]
    with pytest.raises(ValueError, match="--sbatch 'long queue': write an option of sbatch"):
        files.sbatch_script(_job(tmp_path), "0", ["long queue"])
    script = files.sbatch_script(_job(tmp_path, run=Path("/a b/5%")), "0")
    assert '#SBATCH --output="/a b/5%%/slurm-%j.log"' in _directives(script)


@pytest.mark.parametrize("limit", ["600", "10", "10:00", "0:10:00", "0-1", "1-00:00", "1-2:3:4", "0"])
def test_time_limits_that_slurm_takes(tmp_path, limit):
    assert f"#SBATCH --time={limit}" in _directives(files.sbatch_script(_job(tmp_path), limit))


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ("soon", "'soon': write minutes"),
        ("-5", "'-5': write minutes"),
        ("24h", "'24h': write minutes"),
        ("5", "is 300 seconds, and the ranks save 300 seconds ahead of the end: use 10 minutes or more"),
        ("00:09:59", "is 599 seconds"),
        ("0-0:1", "is 60 seconds"),
    ],
)
def test_time_limits_that_leave_no_time(tmp_path, limit, problem):
    with pytest.raises(ValueError, match=problem):
        files.sbatch_script(_job(tmp_path), limit)


def _manifest(folder, **other):
    job = _job(folder, **other)
    return yaml.safe_load(files.ray_job_manifest(job, [job.run, folder / "speech"], 3, "lab/tessera:1"))


def test_ray_job_runs_the_same_launch_on_its_cluster(tmp_path):
    manifest = _manifest(tmp_path, name="Tiny_KNN")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    assert manifest["metadata"]["generateName"] == "tessera-tiny-knn-"
    workers = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    [container] = workers["template"]["spec"]["containers"]
    assert workers["replicas"] == 2
    assert container["image"] == "lab/tessera:1"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "4"
    assert container["volumeMounts"][0]["mountPath"] == str(tmp_path), "the run and the data lie below"
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:3] == ["tessera", "launch", "speech/wav2vec2_tiny"]
    assert set(OVERRIDES) < set(words)
    longest = _manifest(tmp_path, name="a long name, " * 9)["metadata"]["generateName"] + "12345"
    assert len(longest) <= 47, "what KubeRay takes"


def test_ray_job_without_gpus(tmp_path):
    cluster = _manifest(tmp_path, gpus=False)["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        assert set(container["resources"]["limits"]) == {"cpu", "memory"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}, "or ranks would share its small pod"


def test_ray_job_paths_are_on_one_volume(tmp_path):
    with pytest.raises(ValueError, match="runs/a is relative"):
        files.ray_job_manifest(_job(tmp_path, run=Path("runs/a")), [Path("runs/a")], 0, "lab/t:1")
    job = _job(tmp_path, run=Path("/runs/a"))
    with pytest.raises(ValueError, match="/data/speech and /runs/a share no folder"):
        files.ray_job_manifest(job, [Path("/data/speech"), job.run], 0, "lab/t:1")


def test_ray_job_is_what_kuberay_takes(tmp_path):
    """By the field names, types and requirements of its custom resource; a field it does not know it would drop."""
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    manifest = _manifest(tmp_path)
    jsonschema.validate(manifest, schema)
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replica"] = 2
    with pytest.raises(jsonschema.ValidationError, match="'replica' was unexpected"):
        jsonschema.validate(manifest, schema)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_reads_the_ray_job(tmp_path):
    """Its own reading, which needs no cluster; `create --dry-run=client` asks one for the resource's type."""
    job = _job(tmp_path)
    text = files.ray_job_manifest(job, [job.run], 3, "lab/tessera:1")
    command = ["kubectl", "annotate", "--local", "--filename", "-", "read=yes", "--output", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}  # no cluster of the user's
    read = json.loads(
        subprocess.run(command, input=text, env=environment, capture_output=True, check=True, text=True).stdout
    )
    assert read["metadata"].pop("annotations") == {"read": "yes"}
    assert read == yaml.safe_load(text)


def test_deepspeed_takes_the_hostfile_command(tmp_path):
    """DeepSpeed's runner parses what we would start, and a host's shell gives the trainer these arguments."""
    from deepspeed.launcher import runner
    from deepspeed.launcher.multinode_runner import PDSHRunner

    hosts = tmp_path / "hosts"
    hosts.write_text("node-a slots=4\nnode-b slots=4\n")
    job = _job(tmp_path)
    command = files.deepspeed_command(job, hosts)
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    arguments = runner.parse_args(command[3:])
    assert (arguments.num_nodes, arguments.num_gpus, arguments.module) == (2, 4, True)
    assert dict(runner.fetch_hostfile(arguments.hostfile)) == {"node-a": 4, "node-b": 4}
    assert arguments.user_script == "pipeline.training"
    pdsh, _, _ = PDSHRunner(arguments, "").get_cmd({}, {"node-a": [0], "node-b": [0]})
    remote = " ".join(pdsh[pdsh.index(arguments.user_script) + 1 :]).replace("%%", "%")  # pdsh joins, and reads %% as %
    words = subprocess.check_output(["sh", "-c", f"printf '%s\\n' {remote}"], text=True).splitlines()
    assert words == ["speech/wav2vec2_tiny", *OVERRIDES, "--run-dir", str(tmp_path / "run")]
    assert files.deepspeed_command(_job(tmp_path, run=tmp_path / "other"), hosts) != command


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
    hosts.write_text("node-a slots=4\nnode-a slots=4\n")
    with pytest.raises(ValueError, match="line 2: node-a is listed twice"):
        files.read_hostfile(hosts, nodes=1, ranks_per_node=1)
    with pytest.raises(ValueError, match="--hostfile is missing"):
        files.read_hostfile(None, nodes=1, ranks_per_node=1)
    with pytest.raises(ValueError, match="gone is no file: give a file"):
        files.read_hostfile(tmp_path / "gone", nodes=1, ranks_per_node=1)
