"""The table of what speech recipes learn: its cells, and one small whole run."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from tests.benchmarks import speech_quality


def metrics(quantizer: str, **changes: object) -> dict[str, object]:
    systems = {name: {"speaker": 0.5, "abx": 0.1} for name in ("log_mel", "untrained", "trained")}
    systems["trained"] = {"speaker": 0.75, "abx": 0.05}
    downstream = {
        "layer": 2,
        "layers": 3,
        "tasks": {
            "speaker": {"chance": 0.25, "tested": 40, "classes": 4},
            "abx": {"chance": 0.5, "triples": 100},
        },
        "systems": systems,
        "left_out": {"language": "one language only"},
    }
    found = {
        "quantizer": quantizer,
        "step": 20,
        "split": "validation",
        "accuracy": 0.305,
        "contrastive_loss": 2.5,
        "chance_loss": 3.434,
        "codebook_perplexity": 12.34,
        "codebook_usage": 0.9,
        "downstream": downstream,
    }
    return found | changes


def test_rows_are_the_baselines_and_a_row_a_quantizer(monkeypatch):
    split = SimpleNamespace(seconds=3600.0, labels={"a": 1, "b": 2})
    manifest = SimpleNamespace(splits={"train": split, "validation": split})
    monkeypatch.setattr(speech_quality, "read_manifest", lambda _: manifest)
    lost = metrics("ema", accuracy=None, contrastive_loss=None, codebook_perplexity=float("nan"))
    lines = speech_quality.table_of([metrics("gumbel"), lost], None).splitlines()
    assert lines[0] == "| features | accuracy | loss (chance) | perplexity | codes in use | speaker | ABX error |"
    assert lines[2:7] == [
        "| guessing |  |  |  |  | 25.0% | 50.0% |",
        "| log-mel |  |  |  |  | 50.0% | 10.0% |",
        "| untrained encoder |  |  |  |  | 50.0% | 10.0% |",
        "| gumbel | 30.5% | 2.500 (3.434) | 12.3 | 90.0% | 75.0% | 5.0% |",
        "| ema | – | – (3.434) | – | 90.0% | 75.0% | 5.0% |",
    ]
    assert "1.00 h of 2 speakers" in lines[-1]
    assert lines[-1].endswith("Left out, language: one language only.")


def test_the_language_is_in_the_speakers_name():
    assert speech_quality.language_of("prompts-fr-alice") == speech_quality.language_of("stamps-fr") == "fr"


@pytest.mark.slow  # prepares, trains twice, evaluates twice
@pytest.mark.timeout(900)
def test_a_small_corpus_becomes_a_table_and_nothing_is_done_twice(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "corpus" / f"tones-{'de' if number % 2 else 'fr'}-{number}" / "1"
        folder.mkdir(parents=True)
        for clip in range(10):
            time = np.arange(24_000) / 16_000
            sound = np.sin(2 * np.pi * (150 + 40 * number) * time) + 0.3 * generator.standard_normal(24_000)
            soundfile.write(folder / f"{folder.parent.name}-1-{clip:04d}.flac", 0.2 * sound, 16_000)
    out = tmp_path / "quality"
    command = [sys.executable, "-m", "tests.benchmarks.speech_quality", "schedule.warmup_steps=1", "batch.seconds=6"]
    command += ["--out", str(out), "--steps", "4", "--corpus", str(tmp_path / "corpus")]
    command += ["--quantizers", "gumbel", "knn_simplex"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == [
        "| features",
        "| ---",
        "| guessing",
        "| log-mel",
        "| untrained encoder",
        "| gumbel",
        "| knn_simplex",
    ]
    written = [run / "metrics.json" for run in sorted((out / "runs").iterdir())]
    assert [json.loads(file.read_text())["step"] for file in written] == [4, 4]
    before = [file.stat().st_mtime_ns for file in written]
    again = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    assert (again.stdout, [file.stat().st_mtime_ns for file in written]) == (done.stdout, before)
