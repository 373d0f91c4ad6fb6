"""What this machine or cluster has, what is missing, and what to do about it: `tessera doctor`.

In: the folders that runs and data sets will go to. Out: one :class:`Finding` a probe, never a traceback: a probe that
fails is itself a finding. May touch: a temporary file in those folders, and child processes (`launch.doctor_libraries`)
that import the heavy libraries, so that one which crashes or hangs can't take the report with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

State = Literal["ok", "notice", "problem"]
GIBIBYTE = 1024**3
CHILD_SECONDS = 60.0
"""How long a library may take to load before it counts as hanging; a calm machine needs 3 to 6 seconds."""
LIBRARY_PROBES = ("torch", "speech", "deepspeed", "ray")
_PROCESS_GROUP_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    ``state`` is "ok", "notice" (training works, but something is worth knowing) or "problem" (training can't work).
    ``advice`` says what to do and is empty when ``state`` is "ok".
    """

    name: str
    state: State
    detail: str
    advice: str = ""


def diagnose(folders: Iterable[str | Path] = (".",)) -> list[Finding]:
    """Look at everything, the library probes at the same time as the rest.

    ``folders`` are where runs and data sets will be written; a folder that doesn't exist yet is looked at through its
    nearest existing parent.
    """
    probes: list[Callable[[], list[Finding]]] = [find_python, find_versions, find_cores, find_memory]
    probes += [lambda folder=Path(folder): find_disk(folder) for folder in folders]  # type: ignore[misc]
    probes += [find_shared_memory, find_open_files, find_threads]
    with ThreadPoolExecutor(len(LIBRARY_PROBES)) as pool:
        children = {name: pool.submit(probe_library, name) for name in LIBRARY_PROBES}
        findings = [finding for probe in probes for finding in _isolated(probe)]
        for child in children.values():
            findings += child.result()
    return findings


def has_problem(findings: Iterable[Finding]) -> bool:
    """Whether any finding prevents training."""
    return any(finding.state == "problem" for finding in findings)


def print_findings(findings: list[Finding], console: Console | None = None) -> int:
    """Print the findings and what to do about them; returns the exit code: 1 when a problem prevents training."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    colours = {"ok": "green", "notice": "yellow", "problem": "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("state", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("detail", overflow="fold")
    for finding in findings:
        detail = Text(finding.detail)
        if finding.advice:
            detail.append(f"\n→ {finding.advice}", style=colours[finding.state])
        table.add_row(Text(finding.state, style=colours[finding.state]), Text(finding.name, style="bold"), detail)
    console.print(table)
    problems = sum(finding.state == "problem" for finding in findings)
    notices = sum(finding.state == "notice" for finding in findings)
    if problems:
        console.print(Text(f"\n{_count(problems, 'problem')} to solve before training here.", style="red"))
    else:
        rest = _count(notices, "notice") if notices else "nothing to mend"
        console.print(Text(f"\nReady to train; {rest}.", style="green"))
    return int(problems > 0)


def probe_library(name: str, timeout: float = CHILD_SECONDS) -> list[Finding]:
    """Run one of :data:`LIBRARY_PROBES` in a child process; a crash or a hang becomes a problem finding."""
    environment = {key: value for key, value in os.environ.items() if key not in _PROCESS_GROUP_VARIABLES}
    command = [sys.executable, "-m", "launch.doctor_libraries", name]
    house = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), house]))
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        advice = "look for a hanging file system or driver: run `python -X importtime -c 'import torch'`"
        return [Finding(name, "problem", f"did not answer within {timeout:.0f} seconds", advice)]
    lines = [line for line in child.stdout.splitlines() if line.startswith("{")]
    findings = [Finding(**json.loads(line)) for line in lines]
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        detail = f"the probe ended with exit code {child.returncode}: {last}"
        findings.append(Finding(name, "problem", detail, REINSTALL))
    return findings


REINSTALL = "install the locked environment again: `make setup` in a clone of the project"


def find_python() -> list[Finding]:
    """The interpreter against what the project supports."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return [Finding("Python", "ok", version)]
    return [Finding("Python", "problem", f"{version}, the project needs 3.11", "run `make setup PYTHON=python3.11`")]


def required_libraries() -> list[str]:
    """The project's requirements as it was installed, or as its pyproject.toml states them."""
    import tomllib
    from importlib.metadata import PackageNotFoundError, requires

    project = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text())["project"]["dependencies"])
    try:
        return [line for line in requires("tessera") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def find_versions(requirements: list[str] | None = None) -> list[Finding]:
    """Installed versions against the project's requirements; nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.requirements import Requirement

    lines = required_libraries() if requirements is None else requirements
    missing, differing = [], []
    for requirement in map(Requirement, lines):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            missing.append(f"{requirement.name} {requirement.specifier}")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            differing.append(f"{requirement.name} {installed} (needs {requirement.specifier})")
    findings = []
    if missing:
        findings.append(Finding("libraries", "problem", f"not installed: {', '.join(missing)}", REINSTALL))
    if differing:
        detail = f"other versions than pinned: {', '.join(differing)}"
        findings.append(Finding("libraries", "problem", detail, REINSTALL))
    return findings or [Finding("libraries", "ok", f"all {len(lines)} are installed in the pinned versions")]


def find_cores() -> list[Finding]:
    """Cores this process may use: its affinity and its container's quota."""
    cores = float(len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, int(allowed) / int(period))
    load = os.getloadavg()[0]
    detail = f"{cores:g} usable, load {load:.1f}"
    if load > 1.5 * cores:
        return [Finding("cores", "notice", detail, "others are busy here: steps will be slower than planned")]
    return [Finding("cores", "ok", detail)]


def find_memory() -> list[Finding]:
    """Memory that is free now, within the container's limit. One rank's libraries alone take about 0.7 GiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        # The container's count includes file cache, which is given back on demand.
        statistics = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        total = min(total, int(limit.read_text()))
        free = min(free, total - int(used.read_text()) + int(statistics["inactive_file"]))
    detail = f"{free / GIBIBYTE:.1f} GiB free of {total / GIBIBYTE:.1f} GiB"
    if free < 2 * GIBIBYTE:
        advice = "a rank needs at least 2 GiB: end other programs or take a larger machine"
        return [Finding("memory", "problem", detail, advice)]
    if free < 4 * GIBIBYTE:
        return [Finding("memory", "notice", detail, "enough for one small rank: use --ranks 1")]
    return [Finding("memory", "ok", detail)]


def find_disk(folder: Path) -> list[Finding]:
    """Whether ``folder`` can be written and holds room for checkpoints."""
    name = f"disk {folder}"
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    choose = "choose another folder with --run or OUT"
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".tessera-doctor-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return [Finding(name, "problem", f"{existing} can't be written: {error.strerror or error}", choose)]
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIBIBYTE:.1f} GiB free"
    if free < GIBIBYTE:
        return [Finding(name, "problem", detail, f"checkpoints need at least 1 GiB: make room, or {choose}")]
    if free < 10 * GIBIBYTE:
        advice = "enough for small runs: lower training.keep_checkpoints for large ones"
        return [Finding(name, "notice", detail, advice)]
    return [Finding(name, "ok", detail)]


def find_shared_memory(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Room in shared memory, where Ray keeps objects."""
    name = "shared memory"
    if not folder.is_dir():
        return [Finding(name, "notice", f"{folder} is missing", "Ray falls back to /tmp, which is slower: mount it")]
    size = shutil.disk_usage(folder).total
    detail = f"{size / GIBIBYTE:.2f} GiB in {folder}"
    if size < GIBIBYTE:
        return [Finding(name, "notice", detail, "Ray falls back to /tmp: start the container with --shm-size=2g")]
    return [Finding(name, "ok", detail)]


def find_open_files() -> list[Finding]:
    """How many files a process may hold open; Ray's and the shards' descriptors count."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= 4096:
        return [Finding("open files", "ok", f"limit {soft if soft != resource.RLIM_INFINITY else 'none'}")]
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    advice = f"run `ulimit -n {wanted}` first; Ray and data sets of many shards need more than {soft}"
    return [Finding("open files", "notice", f"limit {soft}", advice)]


def find_threads() -> list[Finding]:
    """OMP_NUM_THREADS: several ranks with a thread a core each get in one another's way."""
    value = os.environ.get("OMP_NUM_THREADS")
    if value is None:
        return [Finding("threads", "ok", "OMP_NUM_THREADS is not set: the cores are shared out among the ranks")]
    if not value.isdigit() or not int(value):
        advice = "unset it, or set it to cores / ranks"
        return [Finding("threads", "notice", f"OMP_NUM_THREADS={value} is no number of threads", advice)]
    cores = len(os.sched_getaffinity(0))
    if int(value) > cores:
        advice = f"{cores} cores can't run them at once: unset it, or set it to cores / ranks"
        return [Finding("threads", "notice", f"OMP_NUM_THREADS={value}", advice)]
    return [Finding("threads", "ok", f"OMP_NUM_THREADS={value}")]


def _isolated(probe: Callable[[], list[Finding]]) -> Iterator[Finding]:
    """What a probe found; what it stumbled over is a finding too."""
    try:
        yield from probe()
    except Exception as error:
        name = getattr(probe, "__name__", "probe").removeprefix("find_").replace("_", " ")
        yield Finding(name, "notice", f"could not be looked at: {type(error).__name__}: {error}", "look at it by hand")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    raise SystemExit(print_findings(diagnose()))
