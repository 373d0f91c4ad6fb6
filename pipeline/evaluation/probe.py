"""What goes into a quantizer and what comes out, watched while a model runs over a set.

In: a quantizer, hooked for the length of a `with` block. Out: codebook, collapse and topology metrics over everything
that went through. Changes nothing of what it watches.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from torch import nn

from pipeline.codebooks.collapse import (
    SecondMoments,
    code_latent_divergence,
    codes_dimension,
    effective_dimension,
    fit_codes,
    token_concentration,
)
from pipeline.codebooks.topology import find_torn, grid_correlation
from pipeline.codebooks.watch import GAP
from pipeline.evaluation.codebook import CodeCounts

VARIANCE_FLOOR = 1e-12
"""Variance that is less than this of the mean's square is rounding error of float64: the latents are all equal."""
METRIC_CODES = 65_536
"""Codebooks larger than this are counted, but their geometry is left alone."""


class QuantizerProbe:
    """Collects sums over every forward of ``quantizer``.

    >>> with QuantizerProbe(model.quantizer) as probe:
    ...     model(batch)
    >>> probe.compute()["codebook_perplexity"]
    """

    def __init__(self, quantizer: nn.Module) -> None:
        self.quantizer: Any = quantizer
        self.tokens = 0
        self.counts = CodeCounts()
        self._latents = SecondMoments()
        self._compared = SecondMoments()  # of latents as they are compared with codes
        self._squared_error = 0.0
        self._gap = 0.0  # Σ of the soft/hard gap over the tokens that tell it
        self._gap_tokens = 0
        self._torn = 0
        self._handle: Any = None

    @property
    def has_grid(self) -> bool:
        """Whether the codes lie on a grid of one codebook, so that topology means something."""
        return hasattr(self.quantizer, "are_neighbours") and self.quantizer.groups == 1 and self.quantizer.codes > 1

    @property
    def shares_space(self) -> bool:
        """Whether a code lies where the latents lie that it stands for, as they are compared with it."""
        return bool(self.quantizer.codes and self.quantizer.compares_latents)

    def __enter__(self) -> QuantizerProbe:
        self._handle = self.quantizer.register_forward_hook(self._look, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        latents = args[0] if args else kwargs["z"]
        real = output.codes[..., 0] >= 0  # padding carries the code -1
        codes, latents = output.codes[real], latents[real].float()
        if not len(codes):
            return
        self.tokens += len(codes)
        if self.quantizer.codes:  # `identity` has none
            chosen = [group[group >= 0] for group in codes.T]  # a dropped level of a residual quantizer has -1
            self.counts.add(torch.stack([group.bincount(minlength=self.quantizer.codes) for group in chosen]))
        self._latents.add(latents)
        if GAP in output.metrics:
            self._gap += float(output.metrics[GAP]) * len(codes)
            self._gap_tokens += len(codes)
        if not (self.shares_space or self.has_grid):
            return
        compared = self.quantizer.real_latents(latents, None).double()  # projected, normalised
        if self.has_grid:
            codebook = self.quantizer.codebook()[0]
            self._torn += int(find_torn(compared.float(), codebook, self.quantizer.are_neighbours).sum())
        if not self.shares_space:
            return
        self._compared.add(compared)
        of_groups = self.quantizer.vectors_of(codes.clamp(min=0)) * (codes >= 0).unsqueeze(-1)
        vectors = self.quantizer.join_groups(of_groups)
        self._squared_error += float((vectors.double() - compared).square().sum())

    def compute(self) -> dict[str, float]:
        """Metrics by name; those that mean nothing for this quantizer are left out.

        ``quantization_error`` is the mean squared distance of a latent, as it is compared with codes, and its code,
        ``quantization_error_relative`` that over the latents' total variance: 0 is lossless, 1 is what the latents'
        mean alone would give. The others are those of :func:`pipeline.codebooks.health.measure_watched`.
        """
        if not self.tokens:
            raise ValueError("no real token went through the quantizer: there is nothing to measure")
        covariance = self._latents.covariance()
        metrics: dict[str, float] = {
            "tokens": self.tokens,
            "latent_dimension": effective_dimension(covariance),
        }
        if not self.quantizer.codes:
            return metrics
        metrics |= self.counts.compute()
        if self.shares_space:
            metrics["quantization_error"] = self._squared_error / self.tokens
            if self._varies:
                metrics["quantization_error_relative"] = metrics["quantization_error"] / self._compared.variance()
        if self._gap_tokens:
            metrics[GAP] = self._gap / self._gap_tokens
        if self.quantizer.codes <= METRIC_CODES:
            metrics |= self._codebook_metrics()
        return metrics

    @property
    def _varies(self) -> bool:
        """Whether there are latents to compare with codes that are not all equal."""
        moments = self._compared
        return bool(moments.count) and moments.variance() > VARIANCE_FLOOR * moments.mean_square()

    def code_counts(self) -> list[list[int]]:
        """How often each code of each group occurred; empty for a quantizer without codes."""
        return self.counts.counts.long().tolist() if self.quantizer.codes else []

    @torch.no_grad()
    def _codebook_metrics(self) -> dict[str, float]:
        codebooks = self.quantizer.codebook().float().cpu()
        used = self.counts.counts > 0
        dimensions = [codes_dimension(codebook, of_group) for codebook, of_group in zip(codebooks, used, strict=True)]
        metrics: dict[str, float] = {"code_dimension": sum(dimensions) / len(dimensions)}
        if self._varies and codebooks.shape[0] * codebooks.shape[2] == self.quantizer.codebook_dim:  # else codes add up
            fits = [fit_codes(codebook, of_group) for codebook, of_group in zip(codebooks, used, strict=True)]
            metrics["code_latent_divergence"] = code_latent_divergence(self._compared, fits)
        if len(codebooks) == 1 and self.shares_space:
            latent_rms = math.sqrt(self._compared.mean_square())
            metrics["token_concentration"] = token_concentration(codebooks[0], used[0], latent_rms)
        if self.has_grid:
            metrics["topographic_error"] = self._torn / self.tokens
            metrics["grid_correlation"] = grid_correlation(codebooks[0], self.quantizer.grid_distance().cpu())
        return metrics
