"""Following a run that other processes write."""

import json
import time

import pytest
from rich.console import Console

from launch.follow import Follow, LogReader, describe_line, describe_speed
from recipes.schema import load_recipe


def tiny(*steps):
    """A recipe of so many steps, or with phases of so many."""
    phases = [{"steps": number, "schedule.warmup_steps": 0} for number in steps]
    return load_recipe("image/autoencoder_tiny_ksom", {"name": "tiny", "phases": phases})


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
        with Follow(tmp_path, tiny(20), console):
            time.sleep(0.1)
            _append(tmp_path / "log.jsonl", json.dumps({"step": 10, "attempt": 1, "loss": 2.5}) + "\n")
            _append(
                tmp_path / "log.jsonl", json.dumps({"step": 20, "attempt": 2, "loss": 1.25, "accuracy": 0.5}) + "\n"
            )
    text = output.read_text()
    assert "tiny: step 20/20  loss 1.2500  accuracy 50.0%" in text
    assert "tiny: resumed, first line at step 20" in text


def test_each_phase_is_told_by_its_number_and_its_own_steps(tmp_path):
    output = tmp_path / "output"
    before = tmp_path / "phases" / "1"
    before.mkdir(parents=True)
    with output.open("w") as stream:
        console = Console(file=stream, force_terminal=False)
        with Follow(tmp_path, tiny(4, 20), console):
            time.sleep(0.1)
            _append(before / "log.jsonl", json.dumps({"step": 4, "attempt": 2, "loss": 2.5}) + "\n")
            _append(tmp_path / "log.jsonl", json.dumps({"step": 20, "attempt": 1, "loss": 1.25}) + "\n")
    text = output.read_text()
    assert "tiny, phase 1 of 2: step 4/4  loss 2.5000" in text
    assert "tiny, phase 2 of 2: step 20/20  loss 1.2500" in text
    assert "resumed" not in text, "another start of a phase before says nothing of this one"


def test_missing_values_are_left_out():
    assert describe_line({"loss": None, "codebook_usage": 0.5}) == "usage 50%"


def test_speed_waiting_and_memory_stand_beside_what_is_learnt(tmp_path):
    line = {
        "samples_per_second": 196.39,
        "tokens_per_second": 12569.2,
        "flop_utilisation": 0.414,
        "data_wait_share": 0.03,
        "all_reduce_share": 0.42,
        "memory": 3 * 2**29,
    }
    speed = "196.4 samples/s  12,569 tokens/s  41% of peak FLOP/s  3% waiting for data  42% in all-reduce"
    assert describe_speed(line) == f"{speed}  memory 1.5 GiB"
    assert describe_line(line) == ""
    output = tmp_path / "output"
    with output.open("w") as stream:
        console = Console(file=stream, force_terminal=True, width=240)
        with Follow(tmp_path, tiny(20), console):
            time.sleep(0.1)
            _append(tmp_path / "log.jsonl", json.dumps({"step": 10, "attempt": 1, "loss": 2.5, **line}) + "\n")
    text = output.read_text()
    assert "loss 2.5000" in text
    assert speed in text


def test_skipped_steps_are_seen_on_the_line():
    assert describe_line({"loss": 1.0, "skipped": 2}) == "loss 1.0000  2 steps skipped"
    assert describe_line({"loss": 1.0, "skipped": 0}) == "loss 1.0000"


def test_a_collapse_is_seen_on_the_line():
    line = {"loss": 1.0, "collapse_tokens": 1.0, "collapse_embeddings": 0.0}
    assert describe_line(line) == "loss 1.0000  tokens collapse"


@pytest.mark.parametrize("shown", [True, False])
def test_warnings_are_printed_where_the_ranks_cant_be_heard(tmp_path, shown):
    output = tmp_path / "output"
    with output.open("w") as stream:
        console = Console(file=stream, force_terminal=False)
        with Follow(tmp_path, tiny(20), console, warnings=shown):
            _append(tmp_path / "log.jsonl", json.dumps({"step": 10, "attempt": 1, "warnings": ["few codes"]}) + "\n")
            time.sleep(0.1)
    assert ("tiny: warning at step 10: few codes" in output.read_text()) == shown
