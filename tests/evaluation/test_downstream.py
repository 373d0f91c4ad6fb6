"""Downstream measures of a real run, and of systems whose answer is known."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from launch.cli import app
from pipeline.evaluation import downstream, downstream_table, evaluate
from pipeline.evaluation.catalogue import TASKS
from pipeline.evaluation.downstream import (
    System,
    cut_triples,
    draw_triples,
    hear_clip,
    in_voice,
    layer_features,
    log_mel_features,
    measure_downstream,
    untrained,
)
from pipeline.evaluation.labels import labelled_clips
from pipeline.evaluation.metrics import read_metrics, write_metrics
from pipeline.training.run_folder import Run

HOP = 320


@pytest.fixture(scope="module")
def run(speech_run: Path, speech_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The speech run, its data set with languages beside it: as if the five speakers spoke two."""
    folder = tmp_path_factory.mktemp("downstream")
    data = shutil.copytree(speech_dataset, folder / "data")
    (data / "languages.tsv").write_text("allison-en\ten\nallison-es\ten\nivrvoice-ru\tru\njune-fr\tru\n")
    copy = shutil.copytree(speech_run, folder / "run")
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace(str(speech_dataset), str(data)))
    return copy


def test_three_systems_are_measured_alike(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downstream, "CLIPS", 12)
    metrics = evaluate(run, downstream=True)
    found = metrics["downstream"]
    assert (found["layer"], found["layers"], found["clips"]) == (2, 3, 60)
    assert found["left_out"] == {}
    assert found["tasks"]["speaker"] == {"chance": 0.2, "classes": 5, "fitted": 45, "tested": 15}
    assert found["tasks"]["language"] == {"chance": 0.5, "classes": 2, "fitted": 24, "tested": 48}
    assert found["tasks"]["abx"]["triples"] > 100
    assert list(found["systems"]) == ["log_mel", "untrained", "trained"]
    for values in found["systems"].values():
        assert set(values) == {"speaker", "language", "abx"}
        assert all(0 <= value <= 1 for value in values.values())
    # Five studio voices: bands alone tell them, and a sound in another voice is nearer than another sound.
    assert found["systems"]["log_mel"]["speaker"] > 0.6
    assert found["systems"]["log_mel"]["abx"] < 0.4
    assert found["systems"]["trained"] != found["systems"]["untrained"]
    console = Console(record=True, width=200)
    console.print(downstream_table(metrics))
    text = console.export_text()
    for word in ("speaker identification", "log-mel", "untrained", "5 speakers, chance 20.0%", "layer 2 of 3"):
        assert word in text


def test_a_plain_evaluation_keeps_what_is_known_of_its_checkpoint(run: Path, tmp_path: Path) -> None:
    """And drops what is of another one, or of other data, and says so."""
    copy = shutil.copytree(run, tmp_path / "run")
    metrics = evaluate(copy)
    known = {
        "layer": 2,
        "layers": 3,
        "clips": 60,
        "tasks": {},
        "left_out": dict.fromkeys(TASKS, "never"),
        "systems": {},
    }
    write_metrics(copy / "metrics.json", {**metrics, "downstream": known})
    again = evaluate(copy, split="train")
    assert again["downstream"] == known
    assert read_metrics(copy) == again

    cases = {
        "step": (2, "on the checkpoint of step 2, not 3"),
        "data": ("/other/data", f"on the data set /other/data, not {metrics['data']}"),
    }
    for name, (before, told) in cases.items():
        write_metrics(copy / "metrics.json", {**metrics, "downstream": known, name: before})
        done = CliRunner().invoke(app, ["evaluate", str(copy)])
        assert done.exit_code == 0, done.output
        assert f"downstream measures of the evaluation before dropped, measured {told}: --downstream" in done.output
        assert "downstream" not in (read_metrics(copy) or {})
    assert CliRunner().invoke(app, ["evaluate", str(copy), "--layer", "2"]).exit_code == 2


def test_what_labels_do_not_allow_is_left_out_and_said(
    speech_run: Path, speech_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downstream, "CLIPS", 8)
    model, recipe = Run(speech_run).load_model()
    found = measure_downstream(model, recipe, speech_dataset, layer=3)
    assert found["layer"] == 3
    assert "languages.tsv" in found["left_out"]["language"]
    assert all(set(values) == {"speaker", "abx"} for values in found["systems"].values())
    with pytest.raises(ValueError, match="layer 4 is not in the encoder: use 1 to 3"):
        measure_downstream(model, recipe, speech_dataset, layer=4)
    monkeypatch.setattr(downstream, "FEWEST", 1000)
    with pytest.raises(ValueError, match="no speaker with 1000 clips"):
        measure_downstream(model, recipe, speech_dataset)


def test_images_have_no_downstream_measures(image_run: Path) -> None:
    with pytest.raises(ValueError, match="downstream measures are of speech"):
        evaluate(image_run, downstream=True)


def test_features_are_the_layers_outputs(speech_run: Path, speech_dataset: Path) -> None:
    model, recipe = Run(speech_run).load_model()
    clip = labelled_clips(speech_dataset, speakers=1, clips=1, fewest=1, shortest=40_000)[0]
    waveform = hear_clip(recipe, clip)
    last = layer_features(model, 3, "cpu")(waveform)
    outputs = []
    handle = model.encoder.layers[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        model.extract(waveform.unsqueeze(0), torch.tensor([len(waveform)]))
    handle.remove()
    assert torch.equal(last, outputs[0][0])
    assert not torch.equal(last, layer_features(model, 2, "cpu")(waveform))
    mel = log_mel_features(HOP)(waveform)
    assert mel.shape[1] == 80
    assert abs(len(mel) - len(last)) <= 1
    # The untrained encoder is the recipe's own, the same every time.
    first, second = untrained(recipe), untrained(recipe)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_x_is_where_a_was_in_the_other_voice() -> None:
    """Features that say where in the clip a frame is: A and X then say the same, B another."""
    seconds = torch.arange(48_000) / 16_000

    def clock(waveform: Tensor) -> Tensor:
        share = torch.linspace(0, 3, len(waveform) // HOP)
        return torch.stack([share.cos(), share.sin()], dim=1)

    waveform = (seconds * 700).sin() * (1 + seconds)
    triples = draw_triples("a clip", waveform)
    assert len(triples) == 4
    assert triples == draw_triples("a clip", waveform)
    assert all(abs(a - b) >= 1_600 for a, b in triples)
    system = System(clock)
    frames = system.hear(waveform)
    for voice in ((5, 4), (4, 5)):
        cut = cut_triples(frames, clock(in_voice(waveform, voice)), triples, HOP, voice)
        system.triples[voice] = cut
        assert {len(x) for _, _, x in cut} == {4 if voice == (5, 4) else 6}
        for a, b, x in cut:
            assert (a.mean(dim=0) - x.mean(dim=0)).norm() < 0.03 < (b.mean(dim=0) - x.mean(dim=0)).norm()
    assert system.abx() == 0
    assert draw_triples("silence", torch.zeros(48_000)) == []
