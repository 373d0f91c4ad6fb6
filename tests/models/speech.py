"""A tiny speech model and micro-batches for it, made without a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.data import SpeechBatch
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.masking import conv_frames, draw_negatives, span_mask
from pipeline.models import build_model
from pipeline.models.config import STANDARD_KERNELS, Wav2Vec2Config
from pipeline.quantizers import QuantizerConfig

LENGTHS = (20_000, 14_321, 9_000)  # audio samples: 62, 44 and 27 frames


def tiny_config(**changes: Any) -> Wav2Vec2Config:
    """BASE's shape at 1/30 of its width, without dropout."""
    values: dict[str, Any] = {
        "conv_layers": [(16, kernel, stride) for kernel, stride in STANDARD_KERNELS],
        "model_dim": 24,
        "layers": 2,
        "heads": 2,
        "ffn_dim": 32,
        "position_kernel": 16,
        "position_groups": 4,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "feature_dropout": 0.0,
        "layer_drop": 0.0,
        "feature_gradient_scale": 1.0,
        "final_dim": 16,
        "masking": {"negatives": 10},
    }
    return Wav2Vec2Config.model_validate(values | changes)


def tiny_model(quantizer: dict[str, Any] | None = None, seed: int = 0, **changes: Any) -> nn.Module:
    """A model in training mode with weights from ``seed``."""
    from pydantic import TypeAdapter

    torch.manual_seed(seed)
    options = quantizer or {"kind": "ema", "codes": 16}
    return build_model(tiny_config(**changes), TypeAdapter(QuantizerConfig).validate_python(options)).train()


def make_batch(config: Wav2Vec2Config, lengths: Sequence[int] = LENGTHS, seed: int = 0) -> SpeechBatch:
    """A micro-batch of smoothed noise; clip, mask and negatives of a row depend on its length and ``seed`` alone."""
    layers = config.conv_layers
    frame_lengths = [conv_frames(length, layers) for length in lengths]
    waveforms = torch.zeros(len(lengths), max(lengths))
    mask = torch.zeros(len(lengths), max(frame_lengths), dtype=torch.bool)
    drawn = []
    for row, (length, frames) in enumerate(zip(lengths, frame_lengths, strict=True)):
        generator = np.random.default_rng([seed, length])
        clip = np.convolve(generator.standard_normal(length + 7), np.ones(8) / 8**0.5, mode="valid")
        waveforms[row, :length] = torch.from_numpy(clip.astype(np.float32))
        mask[row, :frames] = torch.from_numpy(span_mask(frames, config.masking, generator))
        drawn.append(draw_negatives(int(mask[row].sum()), config.masking.negatives, generator))
    negatives = torch.zeros(len(lengths), max(map(len, drawn)), config.masking.negatives, dtype=torch.int64)
    for row, indexes in enumerate(drawn):
        negatives[row, : len(indexes)] = torch.from_numpy(indexes)
    return SpeechBatch(
        waveforms=waveforms,
        lengths=torch.tensor(lengths),
        mask=mask,
        frame_lengths=torch.tensor(frame_lengths),
        negatives=negatives,
        keys=[f"clip-{length}" for length in lengths],
        step=0,
        number=0,
        targets=int(mask.sum()),
        seconds=sum(lengths) / SAMPLE_RATE,
    )


def join_batches(parts: Sequence[SpeechBatch]) -> SpeechBatch:
    """One micro-batch of the clips of several, all of one length."""
    most = max(part.negatives.shape[1] for part in parts)
    negatives = [torch.nn.functional.pad(part.negatives, (0, 0, 0, most - part.negatives.shape[1])) for part in parts]
    return SpeechBatch(
        waveforms=torch.cat([part.waveforms for part in parts]),
        lengths=torch.cat([part.lengths for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        frame_lengths=torch.cat([part.frame_lengths for part in parts]),
        negatives=torch.cat(negatives),
        keys=[key for part in parts for key in part.keys],
        step=0,
        number=0,
        targets=sum(part.targets for part in parts),
        seconds=sum(part.seconds for part in parts),
    )
