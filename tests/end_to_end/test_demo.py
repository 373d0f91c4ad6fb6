"""The whole main job, as `make demo` runs it."""

import json
import subprocess
import sys
import tarfile

import pytest

from launch.demo import compare_attempts


def test_losses_of_two_attempts_are_compared_step_by_step():
    log = [
        {"step": 1, "loss": 4.0},
        {"step": 2, "loss": 3.0},
        {"step": 2, "loss": 3.5},
        {"step": 3, "loss": 2.0},
    ]
    assert compare_attempts(log) == (1, 0.5)
    assert compare_attempts(log[:2]) == (0, 0.0)


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    command = [sys.executable, "-m", "launch.cli", "demo", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "holds files that no demo made" in result.stderr
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_makes_everything_it_says(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "launch.cli", "demo", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1100, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for sentence in ("set aside:", "SIGKILL to rank 1", "resumed exactly", "Three commands to try next"):
        assert sentence in result.stdout, sentence
    for kind in ("speech", "images"):
        assert (out / "data" / kind / "quarantine.jsonl").read_text().count("\n") >= 3
        assert json.loads((out / "runs" / kind / "metrics.json").read_text())
    tokens = sorted((out / "tokens" / "images").rglob("*.tar"))
    assert tokens
    with tarfile.open(tokens[0]) as archive:
        assert any(name.endswith(".npy") for name in archive.getnames())
    report = (out / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
