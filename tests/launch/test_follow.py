"""Following a run that other processes write."""

import json
import time

import pytest
from rich.console import Console

from launch.follow import Follow, LogReader, describe_line


def _append(file, text):
    with file.open("a") as stream:
        stream.write(text)


def test_a_torn_line_waits_for_its_end(tmp_path):
    file = tmp_path / "log.jsonl"
    reader = LogReader(file)
    assert reader.new_lines() == []
    _append(file, '{"step": 1}\n{"st')
    assert reader.new_lines() == [{"step": 1}]
    _append(file, 'ep": 2}\n')
    assert reader.new_lines() == [{"step": 2}]


def test_a_line_torn_by_a_kill_is_passed_over(tmp_path):
    file = tmp_path / "log.jsonl"
    reader = LogReader(file)
    _append(file, '{"step": 1}\n{"step": 2, "lo\n{"step": 2}\n')
    assert reader.new_lines() == [{"step": 1}, {"step": 2}]


def test_only_lines_written_after_the_start_are_shown(tmp_path):
    file = tmp_path / "log.jsonl"
    _append(file, '{"step": 1}\n')
    assert LogReader(file).new_lines() == []


def test_without_a_terminal_progress_and_resume_are_printed_as_lines(tmp_path):
    output = tmp_path / "output"
    with output.open("w") as stream:
        console = Console(file=stream, force_terminal=False)
        with Follow(tmp_path, steps=20, title="tiny", console=console):
            time.sleep(0.1)
            _append(tmp_path / "log.jsonl", json.dumps({"step": 10, "attempt": 1, "loss": 2.5}) + "\n")
            _append(
                tmp_path / "log.jsonl", json.dumps({"step": 20, "attempt": 2, "loss": 1.25, "accuracy": 0.5}) + "\n"
            )
    text = output.read_text()
    assert "tiny: step 20/20  loss 1.2500  accuracy 50.0%" in text
    assert "tiny: resumed, first line at step 20" in text


def test_missing_values_are_left_out():
    assert describe_line({"loss": None, "codebook_usage": 0.5}) == "usage 50%"


def test_a_collapse_is_seen_on_the_line():
    line = {"loss": 1.0, "collapse_tokens": 1.0, "collapse_embeddings": 0.0}
    assert describe_line(line) == "loss 1.0000  tokens collapse"


@pytest.mark.parametrize("shown", [True, False])
def test_warnings_are_printed_where_the_ranks_cant_be_heard(tmp_path, shown):
    output = tmp_path / "output"
    with output.open("w") as stream:
        console = Console(file=stream, force_terminal=False)
        with Follow(tmp_path, steps=20, title="tiny", console=console, warnings=shown):
            _append(tmp_path / "log.jsonl", json.dumps({"step": 10, "attempt": 1, "warnings": ["few codes"]}) + "\n")
            time.sleep(0.1)
    assert ("tiny: warning at step 10: few codes" in output.read_text()) == shown
