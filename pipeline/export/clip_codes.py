"""Codes of one whole clip, however long, in the memory of a window.

In: a speech model and a waveform. Out: codes. Frames come from the convolutions alone, and a frame hears its receptive
field only, 25 ms in published models: a clip longer than a window is taken window by window, each with the samples its
frames need. The group norm of BASE is over the whole clip's time: its moments are summed over all windows first, and
each window is normalised by those. So the codes are those of the clip taken whole, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import soundfile  # noqa: F401 - before fairseq2: it brings the libsndfile that fairseq2 looks for
import torch
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import batch_norm

from pipeline.data.masking import conv_frames, samples_for

WINDOW = 1_500
"""Frames of a window, 30 s: 0.2 GB for the widest layer of BASE. Shorter clips are taken whole."""


_BLOCK = 16_000
"""Frames of the first convolution, 5 s, whose moments are summed at a time."""


@torch.no_grad()
def clip_codes(model: Any, waveform: Tensor, window: int = WINDOW) -> Tensor:
    """Codes ``(frames, groups)`` int64 of a float32 waveform ``(samples,)``, as training normalises it.

    ``model`` is a :class:`pipeline.models.speech.Wav2Vec2Pretraining` in evaluation mode. Raises ValueError for a clip
    that is shorter than the receptive field.
    """
    layers = model.frame_layers
    frames = conv_frames(len(waveform), layers)
    if not frames:
        raise ValueError(f"the clip has {len(waveform)} audio samples, a frame takes {samples_for(1, layers)}")
    if frames <= window:  # whole, with the samples behind the last frame: the group norm counts them
        return model.quantizer.encode(_features(model, waveform))[0]
    with _moments_of_all(model, waveform):
        parts = _windows(waveform, layers, window)
        return torch.cat([model.quantizer.encode(_features(model, part))[0] for part in parts])


@contextmanager
def _moments_of_all(model: Any, waveform: Tensor) -> Iterator[None]:
    """Within, the group norm of the first convolution, if there is one, goes by the moments of the whole clip."""
    first = model.frontend.feature_extractor.layers[0]
    if first.group_norm is None:
        yield
        return
    mean, variance = _moments(first.conv, waveform, model.frame_layers[:1])

    def normalise(norm: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return batch_norm(inputs[0], mean, variance, norm.weight, norm.bias, eps=norm.eps)

    handle = first.group_norm.register_forward_hook(normalise)
    try:
        yield
    finally:
        handle.remove()


def _features(model: Any, waveform: Tensor) -> Tensor:
    """→ ``(1, frames, feature_dim)``, what the quantizer sees."""
    batch = waveform.unsqueeze(0)
    features, _, _ = model.frontend.extract_features(batch, BatchLayout.of(batch))
    return features


def _windows(waveform: Tensor, layers: Any, window: int) -> Iterator[Tensor]:
    """The samples of frames 0 to window, window to 2 · window, and so on: neighbours overlap by what both hear."""
    frames, hop = conv_frames(len(waveform), layers), math.prod(stride for _, _, stride in layers)
    for first in range(0, frames, window):
        count = min(window, frames - first)
        yield waveform[first * hop : first * hop + samples_for(count, layers)]


def _moments(conv: Any, waveform: Tensor, layers: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance over time of each channel of the first convolution, fp32 ``(channels,)``, summed in fp64."""
    frames = conv_frames(len(waveform), layers)
    total = squares = torch.zeros((), dtype=torch.float64)
    for part in _windows(waveform, layers, _BLOCK):
        outputs = conv(part[None, None])[0].double()  # (channels, frames of the window)
        total, squares = total + outputs.sum(dim=1), squares + outputs.square().sum(dim=1)
    mean = total / frames
    return mean.float(), (squares / frames - mean.square()).clamp(min=0).float()
