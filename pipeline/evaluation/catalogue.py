"""What each metric is called, how it is printed, and what it means: one list for the table and the report.

Pure data and formatting; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One metric: its key in metrics.json, its name for people, how its value is printed, a sentence on how to read
    it.
    """

    key: str
    name: str
    show: Callable[[float], str]
    meaning: str


def percent(value: float) -> str:
    return f"{value:.1%}"


def number(digits: int, unit: str = "") -> Callable[[float], str]:
    """A formatter with ``digits`` after the point."""
    return lambda value: f"{value:,.{digits}f}{unit}"


MEASURES = (
    Measure("accuracy", "contrastive accuracy", percent, "targets told apart from all their distractors"),
    Measure("contrastive_loss", "contrastive loss", number(3), "nats a target; below chance is learnt"),
    Measure("chance_loss", "chance", number(3), "loss of guessing: log(distractors + 1)"),
    Measure("valid_targets", "valid targets", percent, "targets with at least one valid distractor; these are counted"),
    Measure("valid_negatives", "valid negatives", percent, "distractors whose codes differ from the target's"),
    Measure("class_accuracy", "accuracy", percent, "images whose class is named"),
    Measure("class_accuracy_top5", "top-5 accuracy", percent, "images whose class is among the first five guesses"),
    Measure("macro_precision", "precision", percent, "of the images named so, a mean over classes"),
    Measure("macro_recall", "recall", percent, "of the images of a class, a mean over classes"),
    Measure("macro_f1", "F1", percent, "harmonic mean of both, a mean over classes"),
    Measure("purity", "purity", number(3), "images with the most frequent label of their code; grows with the codes"),
    Measure("nmi", "NMI", number(3), "what codes tell of labels, over the mean of both entropies"),
    Measure("psnr", "PSNR", number(2, " dB"), "of the whole set's squared error; higher is better"),
    Measure("ssim", "SSIM", number(4), "structural similarity, mean over images; 1 is equal"),
    Measure("ms_ssim", "MS-SSIM", number(4), "the same at five scales; needs images of 176 pixels a side"),
    Measure(
        "rfid", "rFID", number(2), "Fréchet distance by FID's Inception; lower is better; depends on the set's size"
    ),
    Measure(
        "rfid_torchvision",
        "rFD, torchvision",
        number(2),
        "by torchvision's Inception: not comparable with published FID",
    ),
    Measure("lpips", "LPIPS", number(4), "perceptual distance, mean over images; lower is better"),
    Measure(
        "rfd_random", "rFD, random net", number(4), "Fréchet distance by a fixed untrained net, no FID; lower is better"
    ),
    Measure("mse", "MSE", number(5), "mean squared error of pixels in [0, 1]"),
    Measure("codebook_usage", "codes in use", percent, "share of codes that occur at least once in the set"),
    Measure("codebook_perplexity", "perplexity", number(1), "codes it is worth, from counts over the whole set"),
    Measure("dead_codes", "dead codes", number(0), "codes that never occur in the set"),
    Measure("quantization_error_relative", "quantization error", percent, "latents' variance that the codes lose"),
    Measure("quantization_error", "squared distance to codes", number(4), "mean of a latent to its code"),
    Measure("map_distance", "distance to the map", number(4), "mean to the best prototype, by the map's own distance"),
    Measure(
        "soft_hard_gap", "soft/hard gap", number(4), "mixtures to codes, squared, by feature; 0: no gap at inference"
    ),
    Measure("latent_dimension", "latent dimension", number(0), "axes that hold 99 % of the latents' variance"),
    Measure("code_dimension", "code dimension", number(1), "axes that hold 99 % of the used codes' variance"),
    Measure(
        "code_latent_divergence",
        "code–latent divergence",
        number(3),
        "distance of the codes' distribution to the latents' ÷ their variance; 0: where the latents are",
    ),
    Measure("token_concentration", "code spacing", number(3), "nearest code's distance ÷ latents' norm; 0: collapse"),
    Measure("topographic_error", "topographic error", percent, "latents whose two best codes are no grid neighbours"),
    Measure(
        "grid_correlation", "grid correlation", number(3), "Spearman of distances on grid and in space; 1: ordered"
    ),
    Measure("tokens", "tokens", number(0), "tokens that were quantized"),
    Measure("samples", "samples", number(0), "clips or images evaluated"),
)


def shown(measure: Measure, metrics: dict[str, Any]) -> str:
    """The value as people read it; a dash where it can't be told."""
    value = metrics.get(measure.key)
    if value is None or not math.isfinite(value):
        return "–"
    return measure.show(value)


def present(metrics: list[dict[str, Any]]) -> list[Measure]:
    """The measures that at least one of the runs has, in the catalogue's order; of models with several levels of codes
    each level's follow that of all."""
    keys = list(dict.fromkeys(key for values in metrics for key in values))
    found = []
    for measure in MEASURES:
        found += [measure] if measure.key in keys else []
        levels = [key.removeprefix(f"{measure.key}/") for key in keys if key.startswith(f"{measure.key}/")]
        found += [replace(measure, key=f"{measure.key}/{level}", name=f"{measure.name}, {level}") for level in levels]
    return found


SYSTEMS = {"log_mel": "log-mel", "untrained": "untrained", "trained": "trained"}
"""What downstream measures are taken of: two baselines, and the run."""
TASKS = {"speaker": "speaker identification", "language": "language identification", "abx": "ABX, another voice"}


def downstream_rows(downstream: dict[str, Any]) -> list[tuple[str, list[str], str]]:
    """A row for each downstream measure: its name, a value for each of :data:`SYSTEMS`, and how to read it or why it is
    missing.
    """
    rows = []
    for task, name in TASKS.items():
        if task in downstream["left_out"]:
            rows.append((name, ["–"] * len(SYSTEMS), f"left out: {downstream['left_out'][task]}"))
            continue
        about = downstream["tasks"][task]
        if task == "abx":
            meaning = f"error; chance {percent(about['chance'])}, lower is better; {about['triples']} triples"
        else:
            tested = "other clips" if task == "speaker" else "clips of other speakers"
            meaning = (
                f"balanced accuracy of a linear probe on {about['tested']} {tested}; "
                f"{about['classes']} {task}s, chance {percent(about['chance'])}"
            )
        rows.append((name, [percent(downstream["systems"][system][task]) for system in SYSTEMS], meaning))
    return rows
