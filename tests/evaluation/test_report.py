"""The report of real runs: one file that carries everything it shows."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pipeline.evaluation import evaluate, write_report
from pipeline.evaluation.metrics import write_metrics
from pipeline.evaluation.run_view import open_runs
from pipeline.training.run_folder import Run
from recipes.schema import parse_recipe

VOID = {"meta", "img", "br", "hr", "link", "input"}
ADDRESSES = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}


class Reader(HTMLParser):
    """Collects text, images and addresses, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ADDRESSES]
        self.labels += [value or "" for name, value in attributes if name in ("aria-label", "alt")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def html(speech_run: Path, image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "both.html"
    assert write_report([speech_run, image_run], out) == out
    assert [path.name for path in out.parent.iterdir()] == ["both.html"]
    return out.read_text()


def test_the_report_needs_nothing_but_itself(html: str) -> None:
    reader = Reader(html)
    assert reader.open == []
    assert reader.addresses
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in reader.addresses)
    assert not re.search(r"https?:|file:|//cdn|@import|url\((?!#)", html)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert len(html) < 4_000_000


def test_the_report_shows_speech_and_images(html: str) -> None:
    reader = Reader(html)
    labels, words = "\n".join(reader.labels), "\n".join(reader.words)
    for figure in (
        "Contrastive loss",
        "Codebook perplexity",
        "U-matrix",
        "How often codes occur",
        "Codes by frequency",
    ):
        assert figure in labels
    assert reader.labels.count("original") == 12
    assert sum(label.startswith("reconstruction by ") for label in reader.labels) == 12
    assert sum(label.startswith("spectrogram and codes of ") for label in reader.labels) == 3
    assert any(label.startswith("map of ") for label in reader.labels)
    assert "Codes by speaker" in reader.labels
    assert "Codes by language" not in reader.labels  # no one named them
    assert re.search(r"Code and speaker share \d\.\d\d bits of 2\.32", words)
    for word in ("PSNR", "contrastive accuracy", "topographic error", "4 × 3"):
        assert word in words


def test_languages_and_frozen_features_are_shown_where_they_are_known(
    speech_run: Path, speech_dataset: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(speech_dataset, tmp_path / "data")
    (data / "languages.tsv").write_text("allison-en\ten\nallison-es\ten\nivrvoice-ru\tru\njune-fr\tru\n")
    run = shutil.copytree(speech_run, tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(speech_dataset), str(data)))
    metrics = evaluate(run, batches=1)
    tasks = {
        "speaker": {"chance": 0.2, "classes": 5, "fitted": 60, "tested": 20},
        "abx": {"chance": 0.5, "triples": 320},
    }
    values = {"log_mel": {"speaker": 0.91, "abx": 0.03}, "untrained": {"speaker": 0.5, "abx": 0.25}}
    values["trained"] = {"speaker": 0.7125, "abx": 0.125}
    downstream = {"layer": 2, "layers": 3, "clips": 80, "tasks": tasks, "systems": values}
    downstream["left_out"] = {"language": "nobody named them"}
    write_metrics(run / "metrics.json", {**metrics, "downstream": downstream})
    reader = Reader(write_report(run).read_text())
    assert "Codes by language" in reader.labels
    for word in ("speaker identification", "untrained", "91.0%", "71.2%", "12.5%", "left out: nobody named them"):
        assert word in reader.words


def test_one_run_writes_beside_itself(image_run: Path) -> None:
    file = write_report(image_run)
    assert file == image_run / "report.html"
    assert "wav2vec2" not in file.read_text()


def test_two_runs_of_a_kind_are_compared(image_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "again"
    shutil.copytree(image_run, other)
    reader = Reader(write_report([image_run, other], tmp_path / "report.html").read_text())
    assert reader.labels.count("original") == 12
    assert sum(label.startswith("reconstruction by ") for label in reader.labels) == 24
    # Runs of the same recipe are told apart by their folders.
    assert "again" in "".join(reader.words)
    assert image_run.name in "".join(reader.words)


def test_a_kill_and_a_resume_are_marked(image_run: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(image_run, resumed)
    log = resumed / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    again = [{**line, "attempt": 2, "loss": line["loss"] + 0.5} for line in lines[2:]]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines + again))
    words = "".join(Reader(write_report(resumed).read_text()).words)
    assert "resumed 1 time; 2 logged steps done again, losses within 0.5" in words
    unbroken = "".join(Reader(write_report(image_run).read_text()).words)
    assert "resumed" not in unbroken


def test_a_run_without_a_checkpoint_is_shown_as_far_as_it_goes(image_run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    shutil.copytree(image_run, young, ignore=shutil.ignore_patterns("checkpoints", "metrics.json"))
    reader = Reader(write_report(young).read_text())
    assert "no whole checkpoint" in "".join(reader.words)
    assert "Codebook perplexity" in reader.labels


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="at least one run"):
        write_report([])


def test_phases_before_the_last_have_curves_of_their_own(image_run: Path, tmp_path: Path) -> None:
    recipe = Run(image_run).recipe()
    phased = Run(tmp_path / "phased")
    before = Run(phased.path / "phases" / "1")
    shutil.copytree(image_run, phased.path)
    phases = [{"quantizer": "identity", "steps": 3}, {}]
    values = yaml.safe_load(recipe.to_yaml()) | {"phases": phases}
    phased.recipe_file.write_text(parse_recipe(values).to_yaml())
    before.path.mkdir(parents=True)
    lines = [{"step": step, "attempt": 1, "loss_reconstruction": 1 / step, "seconds": 1.0} for step in (1, 2)]
    before.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(phased.path, tmp_path / "report.html")
    words = " ".join(Reader((tmp_path / "report.html").read_text()).words)
    assert "phase 1 identity, 2 of 3 steps in 2 seconds" in words
    views = open_runs([phased.path])
    assert [series.name for series in views[0].series] == ["autoencoder_tiny_ksom, phase 1", "autoencoder_tiny_ksom"]
    assert views[0].series[0].history.curve("loss_reconstruction") == ([1.0, 2.0], [1.0, 0.5])
