"""Which clips of a prepared data set are probed, and what is known of them: speaker and language.

In: a data set folder. Out: :class:`LabelledClip`. Speakers are the labels of the manifest, as `tessera prepare` took
them from folders or metadata. Languages stand in ``languages.tsv`` in the data set folder, if anyone wrote it: a line a
speaker, ``speaker<TAB>language``. Reads indexes only, no sound.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.data import ManifestError, ShardedDataset, read_manifest
from pipeline.data.storage import open_folder

LANGUAGES_FILE = "languages.tsv"


@dataclass(frozen=True)
class LabelledClip:
    """One clip with its labels; ``language`` is "" where no one said."""

    dataset: ShardedDataset
    index: int
    key: str
    speaker: str
    language: str


def read_languages(folder: str | Path) -> dict[str, str]:
    """Language by speaker, of the data set's ``languages.tsv``; empty if there is none.

    Raises :class:`ManifestError` for a line that is not ``speaker<TAB>language``.
    """
    store = open_folder(folder)
    try:
        text = store.read(LANGUAGES_FILE).decode("utf-8")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ManifestError(f"{store.url(LANGUAGES_FILE)} is not UTF-8 text ({error})") from error
    languages = {}
    for number, line in enumerate(text.splitlines(), 1):
        speaker, tab, language = line.partition("\t")
        if not line.strip():
            continue
        if not tab or not speaker.strip() or not language.strip():
            raise ManifestError(
                f"{store.url(LANGUAGES_FILE)}, line {number}: {line!r} is not a speaker, a tab and a language"
            )
        languages[speaker.strip()] = language.strip()
    return languages


def labelled_clips(
    folder: str | Path, *, speakers: int, clips: int, fewest: int, shortest: int, splits: Sequence[str] | None = None
) -> list[LabelledClip]:
    """At most ``clips`` clips of each of at most ``speakers`` speakers, of all ``splits`` (every one by default).

    Clips under ``shortest`` audio samples are left out, and then speakers with fewer than ``fewest`` clips. Which ones
    are taken is decided by the hashes of their names: the same whatever the order and the number of the shards.
    """
    manifest, languages = read_manifest(folder), read_languages(folder)
    found: dict[str, list[LabelledClip]] = defaultdict(list)
    for split, entry in sorted(manifest.splits.items()):
        if not entry.samples or (splits is not None and split not in splits):
            continue
        dataset = ShardedDataset(folder, split)
        for index in range(len(dataset)):
            label = dataset.label(index)
            if label < 0 or dataset.length(index) < shortest:
                continue
            speaker = manifest.classes[label]
            clip = LabelledClip(dataset, index, dataset.keys(index), speaker, languages.get(speaker, ""))
            found[speaker].append(clip)
    enough = sorted((name for name, theirs in found.items() if len(theirs) >= fewest), key=_hash)
    chosen = []
    for name in enough[:speakers]:
        chosen += sorted(found[name], key=lambda clip: _hash(clip.key))[:clips]
    return chosen


def speaker_folds(clips: Sequence[LabelledClip]) -> list[tuple[list[int], list[int]]]:
    """Train and test places for telling speakers apart: of each speaker three clips in four, and the fourth."""
    train: list[int] = []
    test: list[int] = []
    for places in _by([clip.speaker for clip in clips]).values():
        cut = len(places) * 3 // 4
        train += places[:cut]
        test += places[cut:]
    return [(train, test)]


def language_folds(clips: Sequence[LabelledClip]) -> list[tuple[list[int], list[int]]]:
    """Train and test places for telling languages apart, without a speaker in both: half of the speakers of each
    language, then the other half. Languages with one speaker are left out; empty if that leaves fewer than two.
    """
    speakers: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(clip.speaker for clip in clips if clip.language):
        speakers[next(clip.language for clip in clips if clip.speaker == name)].append(name)
    several = {language: names for language, names in speakers.items() if len(names) > 1}
    if len(several) < 2:
        return []
    half = {name for names in several.values() for name in sorted(names, key=_hash)[::2]}
    known = [place for place, clip in enumerate(clips) if clip.language in several]
    first = [place for place in known if clips[place].speaker in half]
    second = [place for place in known if clips[place].speaker not in half]
    return [(first, second), (second, first)]


def _by(labels: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    return places


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
