"""`tessera plan`: what it says of a run, and that it says what to do."""

import io
import re

import pytest
from rich.console import Console

from launch.plan import print_plan
from recipes.schema import RecipeError

IMAGE, SPEECH = "image/autoencoder_tiny_ksom", "speech/wav2vec2_tiny"


def plan(recipe, *overrides, **options):
    console = Console(record=True, width=160, file=io.StringIO())
    print_plan(recipe, overrides, options.pop("ranks", 1), console=console, **options)
    return console.export_text()


def row(text, name):
    return re.search(rf"│ +{re.escape(name)} +│ (.*?) +│", text)[1]


def in_bytes(text):
    number, unit = re.match(r"([\d.]+) (B|KiB|MiB|GiB)", text).groups()
    return float(number) * 1024 ** ["B", "KiB", "MiB", "GiB"].index(unit)


def test_memory_is_the_sum_of_its_parts():
    text = plan(IMAGE, ranks=2)
    parts = ["weights", "gradients", "optimiser", "codebooks", "micro-batches", "ZeRO's buckets"]
    working = max(in_bytes(row(text, "activations")), in_bytes(row(text, "or optimiser step")))
    total = sum(in_bytes(row(text, part)) for part in parts) + working
    assert in_bytes(row(text, "memory a rank")) == pytest.approx(total, rel=0.02)
    assert "8 images of 64 × 64" in row(text, "activations")
    assert "engine.activation_checkpointing=true" in text
    assert "tessera train image/autoencoder_tiny_ksom --run RUN --ranks 2" in text


def test_time_is_work_over_the_rate(image_dataset, speech_dataset):
    images = plan(IMAGE, f"data.path={image_dataset}", rate=16)
    assert row(images, "it sees") == "15,360 images"  # 480 steps of 4 micro-batches of 8
    assert row(images, "time").startswith("16.0 min at 16 images a second")
    speech = plan(SPEECH, f"data.path={speech_dataset}", rate=1)
    hours = float(re.match(r"([\d.]+) h of speech", row(speech, "it sees"))[1])
    all_hours = re.search(r"([\d.]+) h", row(speech, "clips"))[1]
    epochs = float(re.search(r"([\d.]+) epochs", row(speech, "the run"))[1])
    assert 0.7 * epochs * float(all_hours) < hours <= 1.01 * epochs * float(all_hours)  # some are cropped, or too short
    assert row(speech, "time").startswith(f"{hours:.1f} h at 1 s of speech a second")


def test_without_data_or_rate_it_says_how_to_get_them():
    text = plan(SPEECH)
    assert "add data.path=FOLDER" in row(text, "data")
    assert row(text, "it sees") == "at most 2.8 h of speech"  # 160 steps of 4 micro-batches of 16 s
    assert "--rate=AUDIO_PER_SECOND" in row(text, "time")


def test_ranks_that_cannot_share_a_step_are_refused():
    with pytest.raises(RecipeError, match=r"batch.micro_batches=4 can't be shared by 3 ranks"):
        plan(IMAGE, ranks=3)


def test_each_phase_has_its_own_table():
    text = plan(IMAGE, "phases=[{quantizer: identity, steps: 60}, {initialise: kmeans}]", ranks=2)
    first, second = text.split("autoencoder_tiny_ksom, phase 2 of 2, on 2 ranks")
    assert "autoencoder_tiny_ksom, phase 1 of 2, on 2 ranks" in first
    assert "│ quantizer" not in first
    assert row(first, "the run") == "60 steps"
    assert row(second, "quantizer") == "ksom, 1 × 256 codes"
    assert text.count("to run it:") == 1
