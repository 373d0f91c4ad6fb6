"""Span masks and negatives of wav2vec 2.0, drawn per sample.

In: a number of frames, a configuration and the sample's own generator. Out: NumPy arrays. Pure functions, no torch.

Masks are *ragged*: each row keeps as many masked frames as its spans cover, as in the paper. fairseq and fairseq2
unmask random frames until all rows of a batch have the same count, which makes a row's mask depend on its neighbours
and cuts the mean run from 14.7 to 7.7 frames at 8 rows; that is to be had too, for comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

MINIMUM_FRAMES = 4  # a row with fewer frames is not masked: nothing would be left to see it by


class MaskingConfig(BaseModel):
    """Which frames the encoder must predict, and against how many distractors (wav2vec 2.0, arXiv 2006.11477, 3.1 and
    3.2).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    probability: float = Field(0.65, gt=0, le=1, description="spans × length ÷ frames; spans may overlap")
    length: int = Field(10, ge=1, description="frames in a span")
    minimum_spans: int = Field(2, ge=1, description="spans in even the shortest clip")
    mode: Literal["ragged", "same_count"] = Field(
        "ragged",
        description="same_count: random frames are unmasked until the clips of a micro-batch have equally many, as in "
        "fairseq and fairseq2",
    )
    negatives: int = Field(100, ge=1, description="distractors a masked frame, from its own clip")

    @model_validator(mode="after")
    def _leaves_a_negative(self) -> MaskingConfig:
        if self.length * self.minimum_spans < 2:
            raise ValueError(
                f"length={self.length} with minimum_spans={self.minimum_spans} may mask a single frame, which has "
                "no negatives: use 2 or more of either"
            )
        return self


def conv_frames(samples: int, layers: Sequence[Sequence[int]]) -> int:
    """Frames that a stack of valid convolutions ``(dim, kernel, stride)`` makes of ``samples`` audio samples; never
    negative.
    """
    for _, kernel, stride in layers:
        samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
    return samples


def samples_for(frames: int, layers: Sequence[Sequence[int]]) -> int:
    """Audio samples of which the stack makes so many frames, at least 1: those of one are its receptive field."""
    for _, kernel, stride in reversed(layers):
        frames = (frames - 1) * stride + kernel
    return frames


def batch_masks(
    frames: Sequence[int], config: MaskingConfig, generators: Sequence[np.random.Generator]
) -> list[np.ndarray]:
    """Masked frames of each clip of a micro-batch, bool ``(frames,)``, drawn by the clip's generator."""
    masks = [span_mask(of_clip, config, generator) for of_clip, generator in zip(frames, generators, strict=True)]
    if config.mode == "same_count":
        counts = [int(np.count_nonzero(mask)) for mask in masks]
        least = min((count for count in counts if count), default=0)  # clips too short for a mask set no measure
        for mask, count, generator in zip(masks, counts, generators, strict=True):
            if count > least:
                mask[generator.choice(np.flatnonzero(mask), size=count - least, replace=False)] = False
    return masks


def span_mask(frames: int, config: MaskingConfig, generator: np.random.Generator) -> np.ndarray:
    """Masked frames of one clip: bool ``(frames,)``.

    The number of spans is ``probability · frames / length``, rounded up or down by chance so that its mean is exact;
    their starts are distinct and uniform. Clips too short for two spans and a gap get shorter spans, and below
    ``MINIMUM_FRAMES`` no mask.
    """
    mask = np.zeros(frames, dtype=bool)
    if frames < MINIMUM_FRAMES:
        return mask
    length = min(config.length, frames // 2)
    places = frames - length + 1
    spans = int(config.probability * frames / config.length + generator.random())
    spans = min(max(spans, config.minimum_spans), places)
    starts = generator.choice(places, size=spans, replace=False)
    mask[(starts[:, None] + np.arange(length)).ravel()] = True
    return mask


def draw_negatives(
    masked: int, negatives: int, generator: np.random.Generator, out: np.ndarray | None = None
) -> np.ndarray:
    """Distractors of one clip: int64 ``(masked, negatives)``, row ``n`` uniform over the clip's other masked frames,
    never ``n``; written into ``out`` if it is given.

    The values count masked frames, not frames, so a distractor can't fall on padding or on an unmasked frame. With
    fewer than two masked frames there is nothing to draw from, and the result has no rows.
    """
    if out is None:
        out = np.empty((masked if masked >= 2 else 0, negatives), dtype=np.int64)
    if masked >= 2:
        word: Any = np.uint16 if masked <= 1 << 16 else np.uint32  # small words take fewer random bits
        drawn = generator.integers(0, masked - 1, size=(masked, negatives), dtype=word)
        # Numbers from n on stand for their successors: what is left is uniform over all but n.
        np.add(drawn, drawn >= np.arange(masked, dtype=word)[:, None], out=out, casting="unsafe")
    return out
