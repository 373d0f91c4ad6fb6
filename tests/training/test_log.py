"""Which alarms become warnings, and where a line of the log goes."""

import json

from pipeline.codebooks import Alarm
from pipeline.training.log import PERSISTENT_STEPS, REMINDER_STEPS, AlarmLog, RunLog

TOKENS, EMBEDDINGS = Alarm("tokens", "quantizer", "few codes"), Alarm("embeddings", "quantizer", "flat latents")


def said(log, alarms, times):
    """How often each of some watched steps in a row said something."""
    return [log.warnings(alarms) for _ in range(times)]


def test_a_collapse_that_passes_is_not_warned_of():
    log = AlarmLog()
    for _ in range(3):
        assert said(log, [TOKENS], PERSISTENT_STEPS - 1) == [[]] * (PERSISTENT_STEPS - 1)
        assert log.warnings([]) == []


def test_a_collapse_that_lasts_is_warned_of_once_and_now_and_then():
    log = AlarmLog()
    spoken = said(log, [TOKENS], PERSISTENT_STEPS + 2 * REMINDER_STEPS)
    places = [number for number, messages in enumerate(spoken, start=1) if messages]
    assert places == [PERSISTENT_STEPS, PERSISTENT_STEPS + REMINDER_STEPS, PERSISTENT_STEPS + 2 * REMINDER_STEPS]
    assert spoken[PERSISTENT_STEPS - 1] == ["few codes"]


def test_a_collapse_that_comes_back_is_warned_of_again():
    log = AlarmLog()
    said(log, [TOKENS], PERSISTENT_STEPS)
    log.warnings([])
    assert said(log, [TOKENS], PERSISTENT_STEPS)[-1] == ["few codes"]


def test_collapses_and_quantizers_are_counted_apart():
    log = AlarmLog()
    said(log, [TOKENS], 2)
    other = Alarm("tokens", "other", "few codes there")
    spoken = said(log, [TOKENS, EMBEDDINGS, other], PERSISTENT_STEPS)
    assert spoken[PERSISTENT_STEPS - 3] == ["few codes"]
    assert spoken[-1] == ["flat latents", "few codes there"]


def test_warnings_stand_in_the_log_beside_the_numbers(tmp_path):
    log = RunLog(tmp_path / "log.jsonl", tmp_path / "tensorboard", attempt=1)
    log.write(10, {"loss": 1.5, "collapse_tokens": 1.0, "warnings": ["few codes"]})
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 10,
        "attempt": 1,
        "loss": 1.5,
        "collapse_tokens": 1.0,
        "warnings": ["few codes"],
    }
