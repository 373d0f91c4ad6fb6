"""What frozen features are good for, by one protocol for the trained encoder, the untrained one and log-mel bands.

In: a trained speech model, its recipe and a labelled data set. Out: three measures of each of the three:

- speaker identification: a linear probe on the mean over a clip's frames, tested on other clips of the same speakers;
- language identification: the same, tested on other speakers, half of each language's speakers by turns;
- ABX of sounds in another voice: A and X are the same moment of a clip, X after the clip was resampled as if spoken by
  a voice a quarter higher and faster, or a fifth lower and slower; B is another moment of the clip. ABX of phones needs
  their times, which no prepared data set holds; this asks for something alike and needs no labels. Who hears more than
  the moment knows it by its surroundings too: compare an encoder with the untrained one, which hears as much.

The encoder may have heard clips of the train split, though never a label. Nothing is drawn at random.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torchaudio
from torch import Tensor

from pipeline.data import SampleReference
from pipeline.data.config import SAMPLE_RATE
from pipeline.evaluation.abx import CHANCE, abx_error
from pipeline.evaluation.labels import LANGUAGES_FILE, LabelledClip, labelled_clips, language_folds, speaker_folds
from pipeline.evaluation.linear_probe import probe_accuracy
from pipeline.models import build_collation, build_model

if TYPE_CHECKING:
    from recipes.schema import Recipe

SPEAKERS, CLIPS, FEWEST = 50, 40, 8
"""At most so many speakers, so many clips of each; speakers with fewer than eight clips are left out."""
LONGEST, SHORTEST = 6.0, 0.8
"""Seconds: of longer clips a part is heard, shorter ones are left out."""
ABX_CLIPS, ABX_TRIPLES = 300, 4
"""At most so many clips, so many triples of each."""
SEGMENT = 0.1
"""Seconds of A and of B: about a phone."""
VOICES = ((5, 4), (4, 5))
"""Old and new rate: a clip resampled to four fifths of its samples is heard a quarter higher and faster."""
BANDS = 80

Features = Callable[[Tensor], Tensor]
"""A waveform ``(samples,)`` → frames ``(frames, dim)``, float32 on the CPU."""
Folds = list[tuple[list[int], list[int]]]


@dataclass
class System:
    """One way to make features, and what has been collected of them."""

    features: Features
    pooled: list[Tensor] = field(default_factory=list)  # (dim,) a clip
    frames: int = 0
    total: Tensor | float = 0.0  # (dim,) fp64, over frames
    squares: Tensor | float = 0.0
    triples: dict[tuple[int, int], list[tuple[Tensor, Tensor, Tensor]]] = field(default_factory=dict)  # by voice

    def hear(self, waveform: Tensor) -> Tensor:
        """A clip's frames, counted."""
        frames = self.features(waveform)
        self.pooled.append(frames.mean(dim=0))
        self.frames += len(frames)
        self.total = self.total + frames.double().sum(dim=0)
        self.squares = self.squares + frames.double().square().sum(dim=0)
        return frames

    def abx(self) -> float:
        """Error over all triples, of features standardised by the mean and deviation over all frames."""
        mean = torch.as_tensor(self.total) / self.frames
        deviation = (torch.as_tensor(self.squares) / self.frames - mean.square()).clamp(min=0).sqrt()
        deviation = deviation.clamp(min=1e-6 * float(deviation.max()) + 1e-12)
        wrong = 0.0
        for of_voice in self.triples.values():
            a, b, x = (((torch.stack(side).double() - mean) / deviation) for side in zip(*of_voice, strict=True))
            wrong += abx_error(a, b, x) * len(x)
        return wrong / sum(map(len, self.triples.values()))


@torch.no_grad()
def measure_downstream(
    model: Any, recipe: Recipe, folder: str | Path, layer: int | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Measure a layer of a speech model (1 is the first, the middle one the default) beside both baselines.

    Returned: ``layer`` and ``layers``; ``clips``; ``tasks``, by name (speaker, language, abx) chance and sizes;
    ``left_out``, by name why a task could not be measured; ``systems``, by name (log_mel, untrained, trained) each
    task's value: balanced accuracy, of ABX the error. Raises ValueError for a layer that there is not, and for a data
    set without labelled clips.
    """
    layers = len(model.encoder.layers)
    layer = (layers + 1) // 2 if layer is None else layer
    if not 1 <= layer <= layers:
        raise ValueError(f"layer {layer} is not in the encoder: use 1 to {layers}")
    shortest = int(SHORTEST * SAMPLE_RATE)
    clips = labelled_clips(folder, speakers=SPEAKERS, clips=CLIPS, fewest=FEWEST, shortest=shortest)
    if not clips:
        raise ValueError(
            f"{folder} has no speaker with {FEWEST} clips of {SHORTEST} s or more: downstream measures need speakers, "
            "which `tessera prepare` takes from folders, SPEAKER/CHAPTER/CLIP"
        )
    folds, left_out = _folds(clips, folder)
    hop = math.prod(stride for _, _, stride in model.frame_layers)
    systems = {
        "log_mel": System(log_mel_features(hop)),
        "untrained": System(layer_features(untrained(recipe).to(device), layer, device)),
        "trained": System(layer_features(model, layer, device)),
    }
    step = max(1, len(clips) // ABX_CLIPS)  # clips stand speaker after speaker: of each as many
    for number, clip in enumerate(clips):
        waveform = hear_clip(recipe, clip)
        triples = draw_triples(clip.key, waveform) if number % step == 0 else []
        voice = VOICES[number // step % len(VOICES)]
        for system in systems.values():
            frames = system.hear(waveform)
            if triples:
                other = system.features(in_voice(waveform, voice))
                system.triples.setdefault(voice, []).extend(cut_triples(frames, other, triples, hop, voice))
    tasks = {name: _describe(clips, name, of_task) for name, of_task in folds.items()}
    number = sum(map(len, systems["log_mel"].triples.values()))
    if number:
        tasks["abx"] = {"chance": CHANCE, "triples": number}
    else:
        left_out["abx"] = f"no clip has two loud segments of {SEGMENT} s"
    values = {}
    for name, system in systems.items():
        pooled = torch.stack(system.pooled)
        values[name] = {task: _probe(pooled, clips, task, of_task) for task, of_task in folds.items()}
        if number:
            values[name]["abx"] = system.abx()
    return {
        "layer": layer,
        "layers": layers,
        "clips": len(clips),
        "tasks": tasks,
        "left_out": left_out,
        "systems": values,
    }


def _folds(clips: Sequence[LabelledClip], folder: str | Path) -> tuple[dict[str, Folds], dict[str, str]]:
    """What is fitted and tested, by task; and why a task is left out."""
    folds, left_out = {}, {}
    if len({clip.speaker for clip in clips}) > 1:
        folds["speaker"] = speaker_folds(clips)
    else:
        left_out["speaker"] = f"{folder} has one speaker with {FEWEST} clips or more: to tell them apart takes two"
    if of_languages := language_folds(clips):
        folds["language"] = of_languages
    else:
        left_out["language"] = (
            f"it takes two languages with two speakers each, named in {folder}/{LANGUAGES_FILE}: a line a speaker, "
            "SPEAKER, tab, LANGUAGE"
        )
    return folds, left_out


def _describe(clips: Sequence[LabelledClip], task: str, folds: Folds) -> dict[str, Any]:
    classes = {getattr(clips[place], task) for place in folds[0][1]}
    tested = sum(len(test) for _, test in folds)
    return {"chance": 1 / len(classes), "classes": len(classes), "fitted": len(folds[0][0]), "tested": tested}


def _probe(pooled: Tensor, clips: Sequence[LabelledClip], task: str, folds: Folds) -> float:
    """Balanced accuracy, meaned over folds."""
    names = [getattr(clip, task) for clip in clips]
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    labels = torch.tensor([numbers[name] for name in names])
    found = [probe_accuracy(pooled, labels, train, test) for train, test in folds]
    return sum(found) / len(found)


def untrained(recipe: Recipe) -> Any:
    """The recipe's encoder as its training began: random weights of its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return build_model(recipe.model, recipe.quantizer).eval()


def layer_features(model: Any, layer: int, device: str) -> Features:
    """Outputs of the encoder's ``layer``-th transformer layer."""

    def features(waveform: Tensor) -> Tensor:
        outputs: list[Tensor] = []

        def keep(number: int, output: Tensor, layout: object, layers: int) -> bool:
            if number + 1 == layer:
                outputs.append(output)
            return True

        handle = model.encoder.register_layer_hook(keep)
        try:
            model.extract(waveform.unsqueeze(0).to(device), torch.tensor([len(waveform)]))
        finally:
            handle.remove()
        return outputs[0][0].float().cpu()

    return features


def log_mel_features(hop: int) -> Features:
    """Log-mel bands of 25 ms windows, as many frames as the encoder's, ``hop`` audio samples apart."""
    mel = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=512, win_length=400, hop_length=hop, n_mels=BANDS, center=False
    )
    return lambda waveform: (mel(waveform) + 1e-6).log().T


def hear_clip(recipe: Recipe, clip: LabelledClip) -> Tensor:
    """A clip as the encoder gets it, at most :data:`LONGEST` seconds of it: float32 ``(samples,)``."""
    reference = SampleReference(clip.index, 0, limit=int(LONGEST * SAMPLE_RATE))
    waveforms, _ = build_collation(recipe).clips([reference], [clip.dataset.read(clip.index)])  # type: ignore[attr-defined]
    return waveforms[0]


def in_voice(waveform: Tensor, voice: tuple[int, int]) -> Tensor:
    """Resampled and heard at the old rate: pitch, formants and tempo change together, as with a smaller head."""
    return torchaudio.functional.resample(waveform, *voice)


def draw_triples(key: str, waveform: Tensor) -> list[tuple[int, int]]:
    """Where A and B begin, in audio samples, of at most :data:`ABX_TRIPLES` triples of a clip.

    The clip is cut into segments; those at least as loud as the median one are put in the order of a hash of the clip's
    key, and each is A with the next as B.
    """
    length = int(SEGMENT * SAMPLE_RATE)
    starts = range(0, len(waveform) - length + 1, length)
    power = torch.tensor([float(waveform[start : start + length].square().mean()) for start in starts])
    loud = [start for start, value in zip(starts, power, strict=True) if value > 0 and value >= power.median()]
    loud.sort(key=lambda start: hashlib.sha256(f"{key} {start}".encode()).digest())
    if len(loud) < 2:
        return []
    return list(zip(loud, loud[1:] + loud[:1], strict=True))[:ABX_TRIPLES]


def cut_triples(
    frames: Tensor, other: Tensor, triples: Sequence[tuple[int, int]], hop: int, voice: tuple[int, int]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The frames of A and B, of the clip's ``(frames, dim)``, and of X, of the ``other`` voice's; ``hop`` audio samples
    lie between two frames.

    Every A and B has the same number of frames, and so has every X of a voice; at the end of a clip they begin earlier.
    """
    old, new = voice
    length = max(1, round(SEGMENT * SAMPLE_RATE / hop))
    length_x = max(1, round(length * new / old))

    def segment(source: Tensor, start: float, number: int) -> Tensor:
        first = min(round(start / hop), len(source) - number)
        return source[first : first + number]

    return [
        (segment(frames, a, length), segment(frames, b, length), segment(other, a * new / old, length_x))
        for a, b in triples
    ]
