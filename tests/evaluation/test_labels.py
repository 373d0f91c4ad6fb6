"""Which clips are probed, and how they are divided."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.data import ManifestError
from pipeline.evaluation.labels import LabelledClip, labelled_clips, language_folds, read_languages, speaker_folds

LIMITS = {"speakers": 50, "clips": 6, "fewest": 1, "shortest": 0}


@pytest.fixture
def named(speech_dataset: Path, tmp_path: Path) -> Path:
    """The speech sample with the languages of four of its speakers, as if they were two."""
    folder = shutil.copytree(speech_dataset, tmp_path / "speech")
    (folder / "languages.tsv").write_text("allison-en\ten\nallison-es\ten\n\nivrvoice-ru\tru\njune-fr\tru\n")
    return folder


def test_speakers_and_languages_come_with_the_clips(named: Path) -> None:
    clips = labelled_clips(named, **LIMITS)
    assert len(clips) == 30
    assert {clip.speaker: clip.language for clip in clips} == {
        "allison-en": "en", "allison-es": "en", "carlo-it": "", "ivrvoice-ru": "ru", "june-fr": "ru",
    }  # fmt: skip
    assert all(clip.dataset.keys(clip.index) == clip.key for clip in clips)
    assert all(clip.key.startswith(clip.speaker) for clip in clips)
    assert len(labelled_clips(named, **LIMITS | {"speakers": 2})) == 12
    longer = labelled_clips(named, **LIMITS | {"shortest": 64_000, "clips": 100})
    assert longer
    assert all(clip.dataset.length(clip.index) >= 64_000 for clip in longer)
    assert labelled_clips(named, **LIMITS | {"fewest": 100}) == []
    assert {clip.dataset.split for clip in labelled_clips(named, **LIMITS, splits=["validation"])} == {"validation"}


def test_no_clip_and_no_speaker_of_a_language_is_fitted_and_tested(named: Path) -> None:
    clips = labelled_clips(named, **LIMITS)
    [(train, test)] = speaker_folds(clips)
    assert sorted(train + test) == list(range(30))
    assert len(train) == 20
    assert {clips[place].speaker for place in train} == {clips[place].speaker for place in test}
    folds = language_folds(clips)
    assert len(folds) == 2
    for train, test in folds:
        assert not {clips[place].speaker for place in train} & {clips[place].speaker for place in test}
        for part in (train, test):
            assert {clips[place].language for place in part} == {"en", "ru"}
    assert folds[0] == folds[1][::-1]


def test_a_language_of_one_speaker_is_not_tested(named: Path) -> None:
    def clip(speaker: str, language: str) -> LabelledClip:
        return LabelledClip(None, 0, speaker, speaker, language)  # type: ignore[arg-type]

    assert language_folds([clip("a", "x"), clip("b", "x"), clip("c", "y")]) == []
    folds = language_folds([clip("a", "x"), clip("b", "x"), clip("c", "y"), clip("d", "y"), clip("e", "z")])
    assert sorted(folds[0][0] + folds[0][1]) == [0, 1, 2, 3]


def test_languages_are_optional_and_checked(speech_dataset: Path, named: Path) -> None:
    assert read_languages(speech_dataset) == {}
    (named / "languages.tsv").write_text("allison-en\ten\ncarlo-it italian\n")
    with pytest.raises(ManifestError, match=r"line 2: 'carlo-it italian' is not a speaker, a tab"):
        labelled_clips(named, **LIMITS)
