"""How well codebooks are used and how latents and codes lie to one another, from sums over all ranks.

In: each quantizer's counts of one optimiser step and, in watched steps, sums over its latents. Out: measures by
quantizer, alarms, and a flat summary for the log.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.codebooks.alarm import Alarm, judge_embeddings, judge_tokens
from pipeline.codebooks.collapse import FLAT, code_latent_divergence, effective_dimension, fit_codes
from pipeline.codebooks.topology import grid_correlation, spread_codes
from pipeline.codebooks.watch import Watched, compares, is_map
from pipeline.quantizers.base import Quantizer

MEASURED_CODES = 65_536
"""Codebooks larger than this are counted, but where their codes lie is left alone."""
CORRELATED_CODES = 256
"""Codes that the grid correlation of a step looks at, at most."""


@dataclass(frozen=True)
class QuantizerHealth:
    """One quantizer over one optimiser step; values are by group where the name is in the plural."""

    name: str
    tokens: int
    """Real tokens that it quantized, on all ranks; of a quantizer without codes those that were watched."""
    usages: list[float]
    """Share of codes that were chosen at least once."""
    perplexities: list[float]
    """exp of the entropy in nats of the chosen codes: the number of codes in even use; 0 without tokens."""
    unused: list[int]
    """Codes that no token chose."""
    replaced: int = 0
    """Codes that moved to a latent after this step, in all groups."""
    measures: dict[str, float] = field(default_factory=dict)
    """Of watched steps, see :func:`measure_watched`."""
    alarms: list[Alarm] = field(default_factory=list)
    """The collapses that this step shows; of embeddings in watched steps only."""


class CodebookHealth:
    """All quantizers of a model over one optimiser step: ``quantizers``, measured when it is first looked at, since
    most steps' never is."""

    def __init__(self, measure: Callable[[], list[QuantizerHealth]]) -> None:
        self._measure = measure

    @cached_property
    def quantizers(self) -> list[QuantizerHealth]:
        """Each quantizer's health, by place in the model."""
        return self._measure()

    @property
    def alarms(self) -> list[Alarm]:
        """The collapses of all quantizers."""
        return [alarm for health in self.quantizers for alarm in health.alarms]

    @property
    def warnings(self) -> list[str]:
        """The alarms in words: quantizer, value, threshold and what would do."""
        return [alarm.message for alarm in self.alarms]

    def summary(self) -> dict[str, float]:
        """``codebook_usage`` and ``codebook_perplexity``: means over quantizers and groups; ``codebook_unused`` and
        ``codebook_replaced``: codes of all quantizers and groups; ``collapse_tokens``: whether any quantizer's codes
        have collapsed, 0 or 1. In watched steps also ``collapse_embeddings`` and the means of :func:`measure_watched`
        over the quantizers that have them. With several quantizers also each one's, as ``codebook_usage/<name>``.
        Empty for a model without codebooks, but for watched steps."""
        values: dict[str, float] = {}
        counted = [health for health in self.quantizers if health.usages]
        if counted:
            values["codebook_usage"] = _mean([usage for health in counted for usage in health.usages])
            values["codebook_perplexity"] = _mean([value for health in counted for value in health.perplexities])
            values["codebook_unused"] = float(sum(sum(health.unused) for health in counted))
            values["codebook_replaced"] = float(sum(health.replaced for health in counted))
            values["collapse_tokens"] = self._any_collapse("tokens")
        watched = [health for health in self.quantizers if health.measures]
        if watched:
            values["collapse_embeddings"] = self._any_collapse("embeddings")
        for name in dict.fromkeys(name for health in watched for name in health.measures):
            values[name] = _mean([health.measures[name] for health in watched if name in health.measures])
        if len(self.quantizers) > 1:
            for health in counted:
                values[f"codebook_usage/{health.name}"] = _mean(health.usages)
                values[f"codebook_perplexity/{health.name}"] = _mean(health.perplexities)
            for health in watched:
                values |= {f"{name}/{health.name}": value for name, value in health.measures.items()}
        return values

    def _any_collapse(self, collapse: str) -> float:
        return float(any(alarm.collapse == collapse for alarm in self.alarms))


def measure(name: str, quantizer: Quantizer, counts: Tensor | None, watched: Watched | None) -> QuantizerHealth | None:
    """Health of one quantizer before its update, from its counts ``(groups, codes)`` and its sums, both over all ranks;
    None where there is neither."""
    if counts is None and watched is None:
        return None
    health = QuantizerHealth(name, watched.tokens if watched else 0, [], [], [])
    alarms: list[Alarm | None] = []
    if counts is not None:
        health = measure_usage(name, counts)
        alarms.append(judge_tokens(name, quantizer, health.tokens, health.perplexities))
    measures: dict[str, float] = {}
    if watched is not None and watched.tokens:
        measures = measure_watched(quantizer, watched, counts)
        moments = watched.latents
        spread = moments.variance() / (moments.mean_square() or 1.0)
        dimension, full = int(measures["latent_dimension"]), len(moments.mean())
        alarms.append(judge_embeddings(name, quantizer, watched.tokens, dimension, full, spread))
    return replace(health, measures=measures, alarms=[alarm for alarm in alarms if alarm is not None])


def measure_usage(name: str, counts: Tensor, replaced: int = 0) -> QuantizerHealth:
    """Health from ``counts (groups, codes)``, summed over ranks."""
    # NumPy: a step measures every quantizer, and for so few numbers torch's calls cost several times as much.
    numbers = counts.double().cpu().numpy()
    tokens = numbers.sum(axis=1)
    shares = numbers / np.maximum(tokens, 1)[:, None]
    logarithms = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    perplexities = np.where(tokens > 0, np.exp(-(shares * logarithms).sum(axis=1)), 0.0)
    unused = (numbers == 0).sum(axis=1)
    return QuantizerHealth(
        name=name,
        tokens=int(tokens[0]),
        usages=(1 - unused / numbers.shape[1]).tolist(),
        perplexities=perplexities.tolist(),
        unused=unused.tolist(),
        replaced=replaced,
    )


def measure_watched(quantizer: Quantizer, watched: Watched, counts: Tensor | None) -> dict[str, float]:
    """Measures by name from a step's sums over some tokens; those that mean nothing for a kind are left out.

    ``latent_dimension``, ``code_dimension``: principal axes that hold 99 % of the variance of latents, as they are
    compared with codes, and of codes in use, a mean over groups. ``quantization_error``: mean |x − c|² of a token, and
    ``quantization_error_relative`` over the latents' variance. ``code_latent_divergence``: see there.
    ``topographic_error``: share of tokens whose two nearest codes are no neighbours on the map; ``grid_correlation``:
    Spearman's, of distances on the map and in space. ``soft_hard_gap``: as smoothed kinds give it.
    """
    moments = watched.latents
    variance = moments.variance()
    flat = variance <= FLAT * moments.mean_square()
    measures: dict[str, float] = {"latent_dimension": 0 if flat else effective_dimension(moments.covariance())}
    if watched.smoothed_tokens:
        measures["soft_hard_gap"] = watched.gap / watched.smoothed_tokens
    if compares(quantizer):
        measures["quantization_error"] = watched.squared_error / watched.tokens
        if not flat:
            measures["quantization_error_relative"] = measures["quantization_error"] / variance
    if is_map(quantizer):
        measures["topographic_error"] = watched.torn / watched.tokens
    if counts is not None and quantizer.codes <= MEASURED_CODES:
        codebooks, used = quantizer.codebook().float().cpu(), counts.cpu() > 0
        if bool(used.any(dim=1).all()):
            fits = [fit_codes(*of_group) for of_group in zip(codebooks, used, strict=True)]
            measures["code_dimension"] = _mean([effective_dimension(covariance) for _, covariance in fits])
            if compares(quantizer) and not flat:
                measures["code_latent_divergence"] = code_latent_divergence(moments, fits)
        if is_map(quantizer):
            measures["grid_correlation"] = _mean([_order_on_grid(quantizer, codebook) for codebook in codebooks])
    return {name: value for name, value in measures.items() if math.isfinite(value)}


def _order_on_grid(quantizer: Any, codebook: Tensor) -> float:
    chosen = spread_codes(quantizer.codes, CORRELATED_CODES)
    places = quantizer.grid_places().cpu()[chosen]
    return grid_correlation(codebook[chosen], torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
