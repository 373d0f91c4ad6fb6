"""`tessera doctor`: every trouble becomes a finding that says what to do, and only real trouble stops."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from launch import doctor
from launch.doctor import Finding

HOUSE = Path(__file__).resolve().parents[2]


def hide_library(folder: Path, name: str, body: str) -> None:
    """Put a module called ``name`` in front of the real one for every process that starts from here on."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(body)


def test_the_installed_versions_are_the_pinned_ones() -> None:
    requirements = doctor.required_libraries()
    assert any(line.startswith("torch==") for line in requirements)
    assert [finding.state for finding in doctor.find_versions()] == ["ok"]


def test_missing_and_differing_libraries_are_told_apart() -> None:
    missing, differing = doctor.find_versions(["no-such-library>=1", "torch==1.0.0", "numpy>=1"])
    assert missing.state == differing.state == "problem"
    assert "no-such-library >=1" in missing.detail
    assert "torch" in differing.detail
    assert "numpy" not in differing.detail
    assert missing.advice


def test_a_folder_that_does_not_exist_yet_is_looked_at_through_its_parent(tmp_path: Path) -> None:
    [finding] = doctor.find_disk(tmp_path / "runs" / "first")
    assert finding.state in ("ok", "notice")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_a_problem() -> None:
    # /proc refuses new files from everyone, also from root, for whom a read-only mode bit means nothing.
    [finding] = doctor.find_disk(Path("/proc/runs"))
    assert finding.state == "problem"
    assert "can't be written" in finding.detail
    assert "--run" in finding.advice


def test_a_full_folder_is_a_problem() -> None:
    # The limit on file sizes makes the kernel refuse the probe's bytes, as a full disk would.
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024));"
        "from pathlib import Path; from launch.doctor import find_disk; print(find_disk(Path('.'))[0].state)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE, check=True)
    assert child.stdout.strip() == "problem"


def test_few_open_files_are_a_notice() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        [finding] = doctor.find_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert finding.state == "notice"
    assert "ulimit -n" in finding.advice


@pytest.mark.parametrize(("value", "state"), [(None, "ok"), ("1", "ok"), ("100000", "notice"), ("many", "notice")])
def test_thread_settings(monkeypatch: pytest.MonkeyPatch, value: str | None, state: str) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert doctor.find_threads()[0].state == state


def test_a_library_that_can_not_be_imported_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_library(tmp_path, "soundfile", "raise ImportError('no such library here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [finding] = doctor.probe_library("speech")
    assert finding.state == "problem"
    assert "no such library here" in finding.detail
    assert finding.advice == doctor.REINSTALL


def test_a_library_that_kills_its_process_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_library(tmp_path, "ray", "import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    [finding] = doctor.probe_library("ray")
    assert finding.state == "problem"
    assert "-9" in finding.detail


def test_a_library_that_hangs_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_library(tmp_path, "ray", "import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = time.monotonic()
    [finding] = doctor.probe_library("ray", timeout=1.0)
    assert finding.state == "problem"
    assert time.monotonic() - started < 30


def test_a_cluster_that_does_not_answer_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    [finding] = doctor.probe_library("ray")
    assert finding.state == "problem"
    assert "127.0.0.1:1" in finding.detail
    assert "RAY_ADDRESS" in finding.advice


def test_a_probe_that_fails_is_a_finding() -> None:
    def find_broken_thing() -> list[Finding]:
        raise RuntimeError("the sensor is gone")

    [finding] = doctor._isolated(find_broken_thing)
    assert finding.name == "broken thing"
    assert finding.state == "notice"
    assert "the sensor is gone" in finding.detail


def test_the_exit_code_and_the_advice() -> None:
    console = Console(record=True, width=100)
    fine = [Finding("Python", "ok", "3.11.7"), Finding("cores", "notice", "busy", "wait")]
    assert doctor.print_findings(fine, console) == 0
    assert doctor.print_findings([*fine, Finding("disk", "problem", "full", "make room")], console) == 1
    text = console.export_text()
    assert "make room" in text
    assert "1 problem " in text


def test_this_machine_can_train(tmp_path: Path) -> None:
    """Everything a training run needs is really there, DeepSpeed's process group included."""
    findings = doctor.diagnose([tmp_path])
    names = {finding.name for finding in findings}
    assert {"Python", "libraries", "memory", "GPUs", "collectives", "sound", "fairseq2", "DeepSpeed", "Ray"} <= names
    assert not doctor.has_problem(findings), findings
    assert all(finding.advice for finding in findings if finding.state != "ok")


def test_doctor_itself_loads_nothing_heavy() -> None:
    code = "import sys, launch.doctor; print([name for name in ('torch', 'ray', 'rich') if name in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": str(HOUSE)}
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert child.stdout.strip() == "[]"
