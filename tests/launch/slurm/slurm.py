#!/usr/bin/env python3
"""Stands in for sbatch, srun and scontrol, by the name it is called by: two nodes that are both this machine.

It refuses options that Slurm does not know (from sbatch(1), srun(1), scontrol(1) of Slurm 24.05), really runs the job
and its tasks, puts a requeued job into the queue once more, and plays the time limit: SLURM_TEST_LIMIT names a file,
and when it exists the tasks of the job's first start get the signal that the script asked for.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "time", "signal", "output", "open-mode", "requeue"}
SRUN = {"kill-on-bad-exit", "wait"}
STATE = Path(os.environ["SLURM_TEST_STATE"])


def options(words, known):
    """--name=value words in front, checked; what follows them."""
    found = {}
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0)[2:].partition("=")
        if name not in known:
            sys.exit(f"unrecognized option '--{name}'")
        found[name] = value
    return found, words


def sbatch(words):
    script = Path(words[-1])
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    found, rest = options([line.removeprefix("#SBATCH ") for line in lines], SBATCH)
    assert not rest, rest
    assert re.fullmatch(r"(\d+-)?\d+(:\d\d){0,2}", found["time"]), found["time"]
    if not Path(found["output"]).parent.is_dir():
        sys.exit("Slurm does not make the folder of --output")
    nodes, tasks = int(found["nodes"]), int(found["ntasks-per-node"])
    environment = os.environ | {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": f"node[1-{nodes}]",
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_TEST_TASKS": str(tasks),
        "SLURM_TEST_SIGNAL": re.fullmatch(r"(\w+)@\d+", found["signal"])[1],
    }
    print("Submitted batch job 4711")
    codes = []
    while True:
        output = Path(found["output"].replace("%j", "4711"))
        with output.open("a" if found["open-mode"] == "append" else "w") as stream:
            codes.append(subprocess.run(["bash", script], env=environment, stdout=stream, stderr=stream).returncode)
        (STATE / "codes").write_text(" ".join(map(str, codes)))
        if not (STATE / "requeued").exists():
            return 0
        (STATE / "requeued").unlink()
        del environment["SLURM_TEST_LIMIT"]


def srun(words):
    found, command = options(words, SRUN)
    tasks = []
    for number in range(int(os.environ["SLURM_NTASKS"])):
        place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number % int(os.environ["SLURM_TEST_TASKS"]))}
        tasks.append(subprocess.Popen(command, env=os.environ | place))
    limit = Path(os.environ.get("SLURM_TEST_LIMIT", "/nowhere"))
    first_end, told = None, False
    while any(task.poll() is None for task in tasks):
        time.sleep(0.02)
        if not told and limit.exists():
            told = True
            for task in tasks:
                task.send_signal(signal.Signals[f"SIG{os.environ['SLURM_TEST_SIGNAL']}"])
        ended = [task.returncode for task in tasks if task.poll() is not None]
        first_end = first_end or (time.monotonic() if ended else None)
        late = first_end and time.monotonic() - first_end > int(found["wait"])
        if late or (found["kill-on-bad-exit"] == "1" and any(ended)):
            for task in tasks:
                task.kill()
    return max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks)


def scontrol(words):
    if words[:2] == ["show", "hostnames"]:
        assert words[2] == os.environ["SLURM_JOB_NODELIST"]
        print("127.0.0.1\n127.0.0.1")
    elif words == ["requeue", os.environ["SLURM_JOB_ID"]]:
        (STATE / "requeued").touch()
    else:
        sys.exit(f"invalid keyword: {words[0]}")
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol}[Path(sys.argv[0]).name](sys.argv[1:]))
