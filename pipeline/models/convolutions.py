"""The convolutions of wav2vec 2.0's feature extractor, trained on a CPU in 60 % of the time.

In: a feature extractor of fairseq2, which has its seven convolutions computed channel by channel. Out: the same with
the same parameters; in training, in single precision on a CPU, it computes frame by frame instead:

- oneDNN convolves, and makes the gradient of the input, faster where a frame's channels lie side by side; for the
  gradient of the weight it is far slower there, but that is one product of matrices, since the samples under a kernel
  lie side by side too.
- The first convolution has one input channel. Its outputs' mean and variance over time, which group norm takes,
  follow from those of the few samples under the kernel: norm and convolution become one product of matrices.
- A layer keeps what goes into its GELU alone. The backward pass computes the GELU again, clip by clip.

In evaluation, without gradients, on a GPU and in half precision all is left to fairseq2.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq2.models.wav2vec2 import Wav2Vec2FeatureExtractor
from fairseq2.models.wav2vec2.feature_extractor import Float32GroupNorm, Wav2Vec2FeatureConv1d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, pad

_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's product of matrices, which torch gives its compiler and nobody else; ``torch.mm`` takes twice as long."""


def compute_by_frames(extractor: nn.Module | None) -> None:
    """Let ``extractor``, fairseq2's, train frame by frame. Its parameters, their names and what it computes stay."""
    assert isinstance(extractor, Wav2Vec2FeatureExtractor)
    layers: list[Any] = list(extractor.layers)  # torch types what a module holds as a tensor or module
    for layer in layers:
        layer.conv.__class__ = _LendingConvolution
        if layer.group_norm is not None:
            layer.group_norm.__class__ = _LendingGroupNorm
    extractor.layers = Convolutions(*layers)


class Convolutions(nn.Sequential):
    """fairseq2's layers: waveforms ``(batch, 1, time)`` → features ``(batch, channels, frames)``."""

    quick = True
    """Whether to train frame by frame where that can be done; a plan for a GPU is made without."""

    def forward(self, waveforms: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled() and self._can(waveforms):
            return self.by_frames(waveforms)
        return super().forward(waveforms)

    def _can(self, waveforms: Tensor) -> bool:
        layers: list[Any] = list(self)
        return (
            self.quick
            and _PRODUCT is not None
            and waveforms.device.type == "cpu"
            and waveforms.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and bool(waveforms.shape[1] == 1)
            and all(layer.dropout is None for layer in layers)
        )

    def by_frames(self, waveforms: Tensor) -> Tensor:
        """The same as fairseq2's computation but for rounding."""
        layers: list[Any] = list(self)
        first, *others = layers
        weight, bias = first.conv()
        windows = waveforms[:, 0].unfold(1, weight.shape[2], *first.conv.stride)
        if first.group_norm is None:
            frames = _project(windows, weight[:, 0].expand(len(windows), -1, -1), bias)
        else:
            gain, shift = first.group_norm()
            frames = _project_to_norm(windows, weight[:, 0], gain, shift, first.group_norm.eps)
        frames = frames if first.layer_norm is None else first.layer_norm(frames)
        for layer in others:
            frames = GeluConvolution.apply(frames, *layer.conv(), *layer.conv.stride)
            frames = frames if layer.layer_norm is None else layer.layer_norm(frames)
        return gelu(frames).transpose(1, 2)


class _Lending(nn.Module):
    """Called without an input it gives copies of its weight and bias. ZeRO-3 brings parameters for the time of a call
    of their own module, and takes them away after it."""

    weight: Tensor
    bias: Tensor | None

    def forward(self, *inputs: Tensor) -> Any:
        if inputs:
            return super().forward(*inputs)  # type: ignore[misc]
        return self.weight.clone(), None if self.bias is None else self.bias.clone()


class _LendingConvolution(_Lending, Wav2Vec2FeatureConv1d):  # type: ignore[misc]
    pass


class _LendingGroupNorm(_Lending, Float32GroupNorm):  # type: ignore[misc]
    pass


def _project(windows: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """windows ``(batch, frames, kernel)``, a weight for each clip ``(batch, channels, kernel)``, bias ``(channels,)`` →
    ``(batch, frames, channels)``."""
    if bias is not None:  # as one more sample under the kernel, always 1: its gradient comes with the weight's
        windows = pad(windows, (0, 1), value=1.0)
        weights = torch.cat([weights, bias.expand(len(weights), -1).unsqueeze(2)], dim=2)
    return torch.bmm(windows, weights.transpose(1, 2).contiguous())


def _project_to_norm(windows: Tensor, weight: Tensor, gain: Tensor, shift: Tensor, epsilon: float) -> Tensor:
    """Convolution and group norm with a group a channel: ``(batch, frames, kernel)`` → ``(batch, frames, channels)``.

    In double precision as far as it is small: neighbouring samples are alike, so a variance is a small difference.
    """
    centred = windows.double()
    centred = centred - centred.mean(dim=1, keepdim=True)
    covariance = centred.transpose(1, 2) @ centred / centred.shape[1]  # (batch, kernel, kernel)
    doubled = weight.double()
    variance = ((doubled @ covariance) * doubled).sum(dim=2)  # (batch, channels)
    scale = gain.double() * (variance + epsilon).rsqrt()
    weights = doubled * scale.unsqueeze(2)  # (batch, channels, kernel)
    return _project(centred.to(weight.dtype), weights.to(weight.dtype), shift)


class GeluConvolution(torch.autograd.Function):
    """``conv(gelu(x))``, which keeps x and its weight for the backward pass and nothing else.

    x ``(batch, frames, channels)``, weight ``(outputs, channels, kernel)``, bias ``(outputs,)`` or None, stride →
    ``(batch, fewer frames, outputs)``. Clip by clip, so that what is computed twice is never there for all at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        x, kernel = x.contiguous(), _channels_last(weight)
        y = x.new_empty(len(x), (x.shape[1] - weight.shape[2]) // stride + 1, len(weight))
        for clip, result in zip(x, y, strict=True):
            found = torch.conv2d(_as_image(gelu(clip)), kernel, bias, stride=(1, stride))
            result.copy_(found[0, :, 0].t())
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.has_bias = stride, bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_input, of_weight, of_bias, _ = ctx.needs_input_grad
        dy, kernel = dy.contiguous(), _channels_last(weight)
        outputs, channels, width = weight.shape
        dx = torch.empty_like(x) if of_input else None
        # (outputs, width x channels): the order in which the samples under a kernel lie.
        dweight = x.new_zeros(outputs, width * channels) if of_weight else None
        for number, (clip, gradient) in enumerate(zip(x, dy, strict=True)):
            if dweight is not None:
                windows = gelu(clip).as_strided((len(gradient), width * channels), (ctx.stride * channels, 1))
                dweight += _product(gradient.t(), windows.contiguous())  # oneDNN takes no rows that overlap
            if dx is not None:
                found = torch.ops.aten.convolution_backward(
                    _as_image(gradient), _as_image(clip), kernel, None,
                    [1, ctx.stride], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False],
                )[0]  # fmt: skip
                torch.ops.aten.gelu_backward.grad_input(found[0, :, 0].t(), clip, grad_input=dx[number])
        if dweight is not None:
            dweight = dweight.view(outputs, width, channels).transpose(1, 2)
        return dx, dweight, dy.sum(dim=(0, 1)) if of_bias else None, None


def _as_image(clip: Tensor) -> Tensor:
    """``(frames, channels)`` → ``(1, channels, 1, frames)`` without moving anything."""
    return clip.t().unsqueeze(1).unsqueeze(0)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``(m, k)`` times ``(k, n)``."""
    return a @ b if _PRODUCT is None or a.dtype != torch.float32 else _PRODUCT(a, b.t(), None, "none", [], "")
