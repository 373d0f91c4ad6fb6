"""When a measure of a codebook is a collapse, and what would do about it.

In: a quantizer and its measures of one step. Out: at most one :class:`Alarm` for each of the two collapses of Zhao et
al., "Representation Collapsing Problems in Vector Quantization", arXiv 2411.16550: tokens, where codes concentrate on
few latents, and embeddings, where latents have lost the room to differ. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipeline.codebooks.collapse import FLAT
from pipeline.quantizers.base import Quantizer

Collapse = Literal["tokens", "embeddings"]

FEWEST_CODES_SHARE = 0.1
"""Perplexity below this part of min(codes, tokens) is a token collapse. In a reconstruction of the paper's experiment
EMA-VQ without pretraining stays at 20–25 however large the codebook: 9.8 % of 256 codes and 5.0 % of 512, where with
pretraining it has 91 %. The 19 % of 128 codes are left alone: data of 32 classes need no more."""
ONE_CODE = 1.1
"""Perplexity of a codebook of any size below which one code is all there is: it has 98 % of the tokens."""
FEWEST_TOKENS = 32
"""A step with fewer tokens tells nothing about how codes are used."""
SMALLEST_RANK_SHARE = 0.05
"""Latents with at most this part of full rank have collapsed. VQ without pretraining has 1–2 %, and pretraining brings
3–5 of 256 dimensions up to 17–19, 7 % (Zhao et al., arXiv 2605.06870): the threshold lies between."""
ONE_DIMENSION_OF = 8
"""One dimension of as many or more is a collapse, whatever part of full rank it is."""


@dataclass(frozen=True)
class Alarm:
    """A collapse that was seen."""

    collapse: Collapse
    quantizer: str
    """The quantizer's name in the model."""
    message: str
    """Quantizer, value, threshold and what would do."""


def judge_tokens(name: str, quantizer: Quantizer, tokens: int, perplexities: list[float]) -> Alarm | None:
    """Token collapse, from the step's tokens on all ranks and each group's perplexity."""
    if tokens < FEWEST_TOKENS or not perplexities:
        return None
    most = min(quantizer.codes, tokens)
    threshold = max(FEWEST_CODES_SHARE * most, min(ONE_CODE, most))
    group = min(range(len(perplexities)), key=perplexities.__getitem__)
    if perplexities[group] >= threshold:
        return None
    of_group = f" of group {group}" if len(perplexities) > 1 else ""
    what = (
        f"codes concentrate on few latents: perplexity {perplexities[group]:.2f}{of_group} with {quantizer.codes} "
        f"codes and {tokens} tokens is below {threshold:.2f}"
    )
    return Alarm("tokens", name, f"{name}: {what}: {_any_of(_against_few_codes(name, quantizer))}")


def judge_embeddings(
    name: str, quantizer: Quantizer, tokens: int, dimension: int, full: int, spread: float
) -> Alarm | None:
    """Embedding collapse, from the effective ``dimension`` of so many latents of size ``full``, and from ``spread``,
    their variance over their mean square."""
    if tokens < FEWEST_TOKENS:
        return None
    if spread <= FLAT:
        what = f"latents are nearly equal: their variance is {spread:.1e} of their mean square, at most {FLAT:.0e}"
    else:
        rank = min(full, tokens - 1)
        threshold = max(int(SMALLEST_RANK_SHARE * rank), 1 if rank >= ONE_DIMENSION_OF else 0)
        if dimension > threshold:
            return None
        what = f"latents lie in {dimension} of {full} dimensions, at most {threshold}"
    return Alarm("embeddings", name, f"{name}: {what}: {_any_of(_against_flat_latents(name, quantizer))}")


def _against_few_codes(name: str, quantizer: Quantizer) -> list[str]:
    config, option, remedies = quantizer.config, _option(name), []
    if type(quantizer).set_codebook is not Quantizer.set_codebook:
        remedies.append("pretrain with quantizer.kind=identity, then start from it with codebooks.initialise=kmeans")
    if getattr(config, "replace_after", None) == 0:
        remedies.append(f"let unused codes move ({option}.replace_after=20)")
    if getattr(config, "update_empty", True) is False and getattr(config, "count_init", 1) == 0:
        remedies.append(f"count codes from 1 ({option}.count_init=1)")
    on_grid = hasattr(quantizer, "are_neighbours")
    for weight in ("diversity_weight", "entropy_weight", "weight"):
        if hasattr(config, weight) and not on_grid:
            remedies.append(f"ask for more even use (a higher {option}.{weight})")
    if on_grid and hasattr(config, "temperature"):  # a neighbourhood as wide as the map makes all its codes alike
        remedies.append(f"wait until the neighbourhood is narrow, or start it so (a lower {option}.temperature)")
    if not on_grid:
        remedies.append(f"let codes learn from their neighbours ({option}.kind=ksom)")
    return remedies


def _against_flat_latents(name: str, quantizer: Quantizer) -> list[str]:
    remedies = ["give the encoder wider layers"]
    if quantizer.project_in is not None:
        remedies.append("widen the projection (quantizer.codebook_dim)")
    if quantizer.codes:
        remedies.append("pretrain it with quantizer.kind=identity")
    if getattr(quantizer.config, "commitment", 0):
        remedies.append(f"pull latents less (a lower {_option(name)}.commitment)")
    return remedies


def _option(name: str) -> str:
    """Where a recipe has this quantizer's options: those of a residual quantizer's levels lie one deeper."""
    return "quantizer.level" if ".levels." in f".{name}" else "quantizer"


def _any_of(remedies: list[str]) -> str:
    return ", or ".join(remedies)
