"""Which alarms become warnings."""

import json
import math
import os
import subprocess
import sys

import pytest

from pipeline.codebooks import Alarm
from pipeline.training.alarms import (
    FEWEST_LINES,
    PERSISTENT_STEPS,
    REMINDER_STEPS,
    STUCK_LINES,
    AlarmLog,
    Alarms,
    SpikeAlarm,
)
from pipeline.training.profile import STEPS, STEPS_BEFORE
from pipeline.training.run_folder import Run

TOKENS, EMBEDDINGS = Alarm("tokens", "quantizer", "few codes"), Alarm("embeddings", "quantizer", "flat latents")


def said(log, alarms, times):
    """How often each of some watched steps in a row said something."""
    found = {(alarm.collapse, alarm.quantizer): alarm.message for alarm in alarms}
    return [log.warnings(found) for _ in range(times)]


def test_a_collapse_that_passes_is_not_warned_of():
    log = AlarmLog()
    for _ in range(3):
        assert said(log, [TOKENS], PERSISTENT_STEPS - 1) == [[]] * (PERSISTENT_STEPS - 1)
        assert log.warnings({}) == []


def test_a_collapse_that_lasts_is_warned_of_once_and_now_and_then():
    log = AlarmLog()
    spoken = said(log, [TOKENS], PERSISTENT_STEPS + 2 * REMINDER_STEPS)
    places = [number for number, messages in enumerate(spoken, start=1) if messages]
    assert places == [PERSISTENT_STEPS, PERSISTENT_STEPS + REMINDER_STEPS, PERSISTENT_STEPS + 2 * REMINDER_STEPS]
    assert spoken[PERSISTENT_STEPS - 1] == ["few codes"]


def test_a_collapse_that_comes_back_is_warned_of_again():
    log = AlarmLog()
    said(log, [TOKENS], PERSISTENT_STEPS)
    log.warnings({})
    assert said(log, [TOKENS], PERSISTENT_STEPS)[-1] == ["few codes"]


def test_collapses_and_quantizers_are_counted_apart():
    log = AlarmLog()
    said(log, [TOKENS], 2)
    other = Alarm("tokens", "other", "few codes there")
    spoken = said(log, [TOKENS, EMBEDDINGS, other], PERSISTENT_STEPS)
    assert spoken[PERSISTENT_STEPS - 3] == ["few codes"]
    assert spoken[-1] == ["flat latents", "few codes there"]


def losses_said(losses):
    """Steps, counted from 1, at which a loss was warned of."""
    alarm = SpikeAlarm()
    return [step for step, loss in enumerate(losses, start=1) if alarm.warnings(step, loss)]


def test_a_loss_that_jumps_is_warned_of_once():
    steady = [1.0 + 0.01 * math.sin(step) for step in range(40)]
    assert losses_said([*steady, 3.0, 3.1, 2.9, *steady, 5.0]) == [41, 84]


def test_the_spike_is_named_with_step_value_and_threshold():
    alarm = SpikeAlarm()
    for step in range(20):
        assert alarm.warnings(step, 2.0) == []
    (message,) = alarm.warnings(20, 4.0)
    assert "jumped to 4 at step 20, above 2.4" in message  # ten times 2 % of the median


@pytest.mark.parametrize(
    "losses",
    [
        [10 * 0.9**step for step in range(80)],  # learns
        [1.0 + 0.2 * math.sin(7 * step) for step in range(80)],  # is noisy
        [1.0 + 0.01 * step for step in range(80)],  # rises slowly
        [1.0] * (FEWEST_LINES - 1) + [100.0],  # has only begun
        [1.0] * 20 + [math.nan] * 3 + [1.0] * 20,  # skips steps
    ],
)
def test_a_loss_that_only_moves_is_not_a_spike(losses):
    assert losses_said(losses) == []


def test_one_outlier_does_not_hide_the_next():
    assert losses_said([1.0] * 20 + [50.0] + [1.0] * 5 + [50.0]) == [21, 27]


def test_few_valid_negatives_that_last_are_warned_of():
    alarms = Alarms(negatives=10)
    few = {"loss": 1.0, "contrastive": 0.5, "valid_negatives": 0.3}
    spoken = [alarms.warnings(step, few, []) for step in range(PERSISTENT_STEPS)]
    assert spoken[:-1] == [[]] * (PERSISTENT_STEPS - 1)
    assert "30% of the negatives differ from their target, fewer than 50%" in spoken[-1][0]
    assert Alarms(negatives=10).warnings(0, few | {"valid_negatives": 0.6}, []) == []


def stuck(loss, valid=1.0, lines=STUCK_LINES):
    alarms = Alarms(negatives=99)
    values = {"loss": 1.0, "contrastive": loss, "valid_negatives": valid}
    return [message for step in range(lines) for message in alarms.warnings(step, values, [])]


def test_a_loss_that_stays_at_chance_is_warned_of():
    chance = math.log(100)
    (message,) = stuck(chance)
    assert "4.605 is that of guessing, 4.605 with 99 negatives" in message
    assert stuck(chance, lines=STUCK_LINES - 1) == []
    assert stuck(1.2 * chance), "worse than guessing is no better"
    assert stuck(0.95 * chance) == []


def test_chance_counts_the_negatives_that_ask_something():
    assert stuck(math.log(1 + 99 * 0.6), valid=0.6)
    assert stuck(0.9 * math.log(1 + 99 * 0.6), valid=0.6) == []


def test_images_have_no_chance():
    alarms = Alarms()
    assert [alarms.warnings(step, {"loss": 1.0, "mse": 1.0}, []) for step in range(STUCK_LINES)] == [[]] * STUCK_LINES


@pytest.fixture(scope="module")
def speech_with_two_codes(speech_dataset, tmp_path_factory):
    """Two codes tell at most every other frame from a target. The run is profiled, too."""
    run = tmp_path_factory.mktemp("alarms") / "run"
    steps = STEPS_BEFORE + STEPS + 1
    overrides = [
        f"data.path={speech_dataset}",
        "batch.micro_batches=2",
        "batch.seconds=6",
        "data.max_seconds=3",
        "schedule.warmup_steps=1",
        "quantizer.kind=ema",
        "quantizer.codes=2",
        "codebooks.initialise=none",  # k-means would share the frames out evenly
        "quantizer.replace_after=0",
        f"training.steps={steps}",
        "training.log_every=1",
    ]
    command = [sys.executable, "-m", "pipeline.training", "speech/wav2vec2_tiny", *overrides]
    done = subprocess.run(
        [*command, "--profile", "--run-dir", str(run)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Run(run), done.stderr


def test_a_run_says_it_in_its_log_and_on_the_console(speech_with_two_codes):
    run, console = speech_with_two_codes
    lines = run.log()
    assert all(line["valid_negatives"] < 0.5 for line in lines[:PERSISTENT_STEPS])
    said = [line["step"] for line in lines if any("negatives differ" in text for text in line.get("warnings", []))]
    assert said[:1] == [PERSISTENT_STEPS]
    assert "of the negatives differ from their target" in console


def test_a_profiled_run_leaves_a_trace_of_its_steps(speech_with_two_codes):
    run, console = speech_with_two_codes
    (file,) = (run.path / "profile").iterdir()
    assert file.name == "rank-00000.json"
    names = [event.get("name", "") for event in json.loads(file.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) == STEPS
    assert any("convolution" in name for name in names)
    assert str(run.path / "profile") in console
