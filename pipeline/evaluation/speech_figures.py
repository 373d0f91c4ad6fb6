"""The pictures of speech runs: what was said and the codes it became on one time axis, and who and which language the
codes go with.

In: runs with their models and the split they are measured on. Out: HTML.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torchaudio
from matplotlib.figure import Figure
from torch import Tensor

from pipeline.data import SampleReference
from pipeline.evaluation import page
from pipeline.evaluation.cooccurrence import by_label, count_codes, given_code, in_label_order, information
from pipeline.evaluation.figures import label_map, style, svg
from pipeline.evaluation.labels import labelled_clips
from pipeline.evaluation.metrics import plain_collation
from pipeline.evaluation.run_view import RunView, spread

CLIPS = 3
SECONDS = 4.0
SAMPLE_RATE = 16_000
COUNTED_SPEAKERS, COUNTED_CLIPS = 24, 10
"""Of so many speakers so many clips are counted for the maps of codes and labels."""
MAPPED_GROUPS = 2
SHORTEST = 4800
"""Audio samples of the shortest clip that is counted: some frames."""


def speech_pictures(runs: Sequence[RunView]) -> list[str]:
    """Spectrograms of a few clips with every run's codes below."""
    shown = [run for run in runs if run.model is not None and run.dataset is not None]
    if not shown:
        return []
    explanation = (
        f"The first {SECONDS:g} seconds of clips of the {shown[0].dataset.split} split. Each colour of the strips is "
        "a code, a row for each group of the codebook; the same code has the same colour in every clip."
    )
    figures = [clip_figure(shown, index) for index in spread(len(shown[0].dataset), CLIPS)]
    parts = [page.heading("Speech and its codes", 3), page.paragraph(explanation), *figures]
    for run in shown:
        parts += label_pictures(run)
    return parts


def label_pictures(run: RunView) -> list[str]:
    """Heat maps of the codes that go with speakers and with languages, where the data set names two of them."""
    if not run.model.quantizer.codes:
        return []
    clips = labelled_clips(
        run.dataset.path, speakers=COUNTED_SPEAKERS, clips=COUNTED_CLIPS, fewest=1, shortest=SHORTEST
    )
    counts = count_codes(run.model, run.recipe, clips)
    figures = []
    for word in ("speaker", "language"):
        labels = [getattr(clip, word) for clip in clips]
        if len(set(labels) - {""}) < 2:
            continue
        names, table = by_label(counts, labels)
        for group, of_group in enumerate(table[:MAPPED_GROUPS]):
            shares = given_code(of_group)
            order = in_label_order(shares)
            title = f"Codes by {word}" + (f", group {group + 1}" if len(table) > 1 else "")
            caption = (
                f"How much of a code's use is each {word}'s, if all spoke as much: {len(order)} codes that occur. Code "
                f"and {word} share {information(of_group):.2f} bits of {math.log2(len(names)):.2f}."
            )
            picture = label_map(title, names, shares[:, order].numpy(), f"share of the {word}")
            figures.append(page.figure(picture, caption, "wide"))
    if not figures:
        return []
    about = f"Of up to {COUNTED_CLIPS} clips of up to {COUNTED_SPEAKERS} speakers, of all splits."
    return [page.heading(f"Who and what the codes of {run.name} go with", 3), page.paragraph(about), *figures]


@torch.inference_mode()
def clip_figure(runs: Sequence[RunView], index: int) -> str:
    """One clip: its log-mel spectrogram, and the codes of its frames where they lie in time."""
    strips, batch = [], None
    for run in runs:
        batch = one_clip(run, index)
        codes, lengths = run.model.encode_codes(batch)
        strips.append(codes[0, : int(lengths[0])].T.cpu())  # (groups, frames)
    assert batch is not None
    waveform = batch.waveforms[0, : int(batch.lengths[0])][: int(SECONDS * SAMPLE_RATE)]
    seconds = len(waveform) / SAMPLE_RATE
    heights = [3.0] + [0.28 * max(len(strip), 1) + 0.2 for strip in strips]
    with style():
        figure = Figure(figsize=(9.2, sum(heights) * 0.8 + 0.4))
        rows = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights}, squeeze=False)[
            :, 0
        ]
        rows[0].imshow(
            log_mel(waveform),
            origin="lower",
            aspect="auto",
            cmap="magma",
            extent=(0, seconds, 0, 80),
            interpolation="none",
        )
        rows[0].set_ylabel("mel band")
        rows[0].grid(visible=False)
        captions = []
        for axes, run, strip in zip(rows[1:], runs, strips, strict=True):
            hop, receptive = frame_timing(run.recipe.model.conv_layers)
            offset = (receptive - hop) / 2 / SAMPLE_RATE  # a frame stands in the middle of what it sees
            frames = min(strip.shape[1], int((seconds - offset) * SAMPLE_RATE / hop))
            strip = strip[:, :frames]
            axes.imshow(
                colours(strip, run.model.quantizer.codes),
                aspect="auto",
                interpolation="none",
                extent=(offset, offset + frames * hop / SAMPLE_RATE, len(strip), 0),
            )
            axes.set_yticks(np.arange(len(strip)) + 0.5, [str(group + 1) for group in range(len(strip))])
            axes.set_ylabel("codes" if len(runs) == 1 else run.name, fontsize=8)
            axes.grid(visible=False)
            axes.tick_params(length=0, axis="y")
            different = [str(len(group.unique())) for group in strip]
            captions.append(
                f"{run.name}: {' and '.join(different)} different codes in {frames} frames of {hop / 16:g} ms"
            )
        rows[-1].set_xlabel("seconds")
        rows[-1].set_xlim(0, seconds)
        picture = svg(figure, f"spectrogram and codes of {batch.keys[0]}")
    return page.figure(picture, f"{batch.keys[0]}. {'; '.join(captions)}.", "wide")


def one_clip(run: RunView, index: int) -> Any:
    """The batch that holds one clip, whole."""
    return plain_collation(run.recipe)([SampleReference(index, 0)], run.dataset, 0, 0)


def frame_timing(layers: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Audio samples between two frames, and how many a frame sees, of a stack of convolutions (dim, kernel, stride)."""
    hop, receptive = 1, 1
    for _, kernel, stride in layers:
        receptive += (kernel - 1) * hop
        hop *= stride
    return hop, receptive


def log_mel(waveform: Tensor) -> np.ndarray:
    """``(samples,)`` at 16 kHz → decibels ``(80, frames)``, 80 dB deep."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=512, win_length=400, hop_length=160, n_mels=80)
    decibels = torchaudio.transforms.AmplitudeToDB(top_db=80)
    return decibels(mel(waveform.float().cpu())).numpy()


def colours(codes: Tensor, number: int) -> np.ndarray:
    """A colour for each code ``(groups, frames)`` → ``(groups, frames, 3)``; neighbouring numbers get distant hues."""
    golden = 0.618033988749895
    table = np.array(
        [
            colorsys.hsv_to_rgb(code * golden % 1, (0.45, 0.65, 0.85)[code % 3], (0.95, 0.75)[code % 2])
            for code in range(number)
        ]
    )
    return table[codes.clamp(0, number - 1).numpy()]
