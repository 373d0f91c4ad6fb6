"""Where a line of the log goes, and what stands in one."""

import importlib.util
import json

import pytest

from pipeline.training.log import RunLog, check_wandb
from pipeline.training.run_folder import Run
from recipes.schema import RecipeError, load_recipe


def test_warnings_stand_in_the_log_beside_the_numbers(tmp_path):
    log = RunLog(Run(tmp_path), load_recipe("image/autoencoder_tiny_ksom"))
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


def test_a_line_tells_how_fast_the_run_is(image_run):
    for line in Run(image_run).log():
        # 2 micro-batches of 8 images of 32 × 32 a step, with 8 × 8 tokens each
        assert line["samples_per_second"] == pytest.approx(16 / line["seconds"])
        assert line["tokens_per_second"] == pytest.approx(16 * 64 / line["seconds"])
        assert line["flops_per_second"] > 0
        assert "flop_utilisation" not in line, "a CPU has no peak that we know"
        assert "audio_per_second" not in line
        assert 0 <= line["data_wait_share"] <= 1
        assert 0 <= line["all_reduce_share"] <= 1
        assert line["memory"] > 100e6
        assert line["grad_norm"] > 0


def test_speech_is_counted_in_seconds(speech_run):
    for line in Run(speech_run).log():
        seconds = line["audio_per_second"] * line["seconds"]
        assert 6 < seconds < 12.001  # 2 micro-batches of up to 6 padded seconds


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_that_is_not_there_is_refused():
    check_wandb(None)
    with pytest.raises(RecipeError, match=r"training\.wandb=speech: the package wandb is not installed"):
        check_wandb("speech")


def test_wandb_gets_the_numbers_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for attempt in (1, 2):
        log = RunLog(Run(tmp_path), load_recipe("image/autoencoder_tiny_ksom", ["training.wandb=project"]))
        assert log.attempt == attempt
        log.write(attempt, {"loss": 1.5, "warnings": ["few codes"]})
        log.close()
    folders = list((tmp_path / "wandb").glob("offline-run-*"))
    assert folders, "an offline run lies in the run folder"
    assert len({folder.name.rsplit("-", 1)[1] for folder in folders}) == 1, "a resumed run is the same run"
