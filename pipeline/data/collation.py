"""From sample references to the tensors of a micro-batch.

In: references, a data set, and the numbers of step and micro-batch. Out: a :class:`SpeechBatch` or an
:class:`ImageBatch`, the same bits in any thread and on any rank: crop, mask, negatives and mirroring come from each
sample's own generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.data.audio import DecodeError, decode_audio, normalise
from pipeline.data.config import SAMPLE_RATE, DataConfig
from pipeline.data.image import decode_image, view_image
from pipeline.data.index import ShardError
from pipeline.data.masking import MaskingConfig, conv_frames, draw_negatives, span_mask
from pipeline.data.mixing import Data
from pipeline.data.plan import SampleReference
from pipeline.data.randomness import sample_generator

Batch = TypeVar("Batch", bound="SpeechBatch | ImageBatch")


@dataclass(frozen=True)
class SpeechBatch:
    """Clips of one micro-batch with the frames to predict.

    ``negatives[r, n]`` are distractors of row r's n-th masked frame, counted among that row's masked frames, so never
    padding and never n itself; rows n from the row's masked count on are zeros and mean nothing.
    """

    waveforms: Tensor  # (batch, time) float32, zeros behind a clip's end
    lengths: Tensor  # (batch,) int64, audio samples
    mask: Tensor  # (batch, frames) bool, True where a frame is masked
    frame_lengths: Tensor  # (batch,) int64, frames that hold the clip
    negatives: Tensor  # (batch, max_masked, negatives) int64
    keys: list[str]
    step: int
    number: int  # of the micro-batch within the step
    targets: int  # masked frames
    seconds: float  # of speech, without padding

    def to(self, device: torch.device | str) -> SpeechBatch:
        """The batch with its tensors on ``device``."""
        return _to(self, device)


@dataclass(frozen=True)
class ImageBatch:
    """Images of one micro-batch."""

    pixels: Tensor  # (batch, 3, image_size, image_size) float32 in [0, 1]
    labels: Tensor  # (batch,) int64, places in the manifest's classes, -1 for none
    keys: list[str]
    step: int
    number: int  # of the micro-batch within the step
    targets: int  # values in ``pixels``

    def to(self, device: torch.device | str) -> ImageBatch:
        """The batch with its tensors on ``device``."""
        return _to(self, device)


class SampleError(RuntimeError):
    """A sample that can't be decoded while training."""

    def __init__(self, reference: SampleReference, key: str, reason: str) -> None:
        super().__init__(f"sample {key}: {reason}")
        self.reference = reference
        self.key = key
        self.reason = reason


class Collation(Protocol):
    """What the loader calls for each micro-batch; raises :class:`SampleError` for the first sample that fails."""

    def __call__(
        self, references: Sequence[SampleReference], dataset: Data, step: int, number: int
    ) -> SpeechBatch | ImageBatch: ...


class SpeechCollation:
    """Decode, crop, normalise, pad, mask, and draw negatives."""

    def __init__(
        self, data: DataConfig, masking: MaskingConfig, conv_layers: Sequence[Sequence[int]], seed: int
    ) -> None:
        """``conv_layers`` are the encoder's ``(dim, kernel, stride)``: they decide how many frames a clip has."""
        self.data = data
        self.masking = masking
        self.conv_layers = [tuple(layer) for layer in conv_layers]
        self.seed = seed

    def __call__(
        self, references: Sequence[SampleReference], dataset: Data, step: int = 0, number: int = 0
    ) -> SpeechBatch:
        """The batch of these references, in their order."""
        clips = [self._clip(reference, dataset) for reference in references]
        lengths = np.array([len(clip) for clip in clips], dtype=np.int64)
        waveforms = np.zeros((len(clips), int(lengths.max())), dtype=np.float32)
        for row, clip in enumerate(clips):
            waveforms[row, : len(clip)] = clip
        frame_lengths = np.array([self.frames(int(length)) for length in lengths], dtype=np.int64)
        mask = np.zeros((len(clips), self.frames(waveforms.shape[1])), dtype=bool)
        drawn = []
        for row, reference in enumerate(references):
            frames = int(frame_lengths[row])
            mask[row, :frames] = span_mask(frames, self.masking, self._generator(reference, "mask"))
            masked = int(mask[row].sum())
            drawn.append(draw_negatives(masked, self.masking.negatives, self._generator(reference, "negatives")))
        negatives = np.zeros((len(clips), max(map(len, drawn)), self.masking.negatives), dtype=np.int64)
        for row, indexes in enumerate(drawn):
            negatives[row, : len(indexes)] = indexes
        return SpeechBatch(
            waveforms=torch.from_numpy(waveforms),
            lengths=torch.from_numpy(lengths),
            mask=torch.from_numpy(mask),
            frame_lengths=torch.from_numpy(frame_lengths),
            negatives=torch.from_numpy(negatives),
            keys=[dataset.sources[reference.source].keys(reference.index) for reference in references],
            step=step,
            number=number,
            targets=int(mask.sum()),
            seconds=float(lengths.sum()) / SAMPLE_RATE,
        )

    def frames(self, samples: int) -> int:
        """Frames that the encoder makes of so many audio samples."""
        return conv_frames(samples, self.conv_layers)

    def _generator(self, reference: SampleReference, stream: str) -> np.random.Generator:
        return sample_generator(self.seed, reference.epoch, reference.index, stream, reference.source)

    def _clip(self, reference: SampleReference, dataset: Data) -> np.ndarray:
        source = dataset.sources[reference.source]
        length = source.length(reference.index)
        wanted = min(reference.limit or length, length)
        start = int(self._generator(reference, "crop").integers(length - wanted + 1))
        try:
            waveform = decode_audio(source.read(reference.index).content, start, wanted)
        except (DecodeError, ShardError, OSError, ValueError) as error:
            raise SampleError(reference, source.keys(reference.index), str(error)) from error
        return normalise(waveform) if self.data.normalise else waveform


class ImageCollation:
    """Decode, resize, crop and mirror; without ``augment`` the centre crop, as it is."""

    def __init__(self, data: DataConfig, seed: int, augment: bool = True) -> None:
        self.data = data
        self.seed = seed
        self.augment = augment

    def __call__(
        self, references: Sequence[SampleReference], dataset: Data, step: int = 0, number: int = 0
    ) -> ImageBatch:
        """The batch of these references, in their order."""
        pixels = torch.stack([self._view(reference, dataset) for reference in references])
        return ImageBatch(
            pixels=pixels,
            labels=torch.tensor([dataset.sources[each.source].label(each.index) for each in references]),
            keys=[dataset.sources[reference.source].keys(reference.index) for reference in references],
            step=step,
            number=number,
            targets=pixels.numel(),
        )

    def _view(self, reference: SampleReference, dataset: Data) -> Tensor:
        source = dataset.sources[reference.source]
        try:
            image = decode_image(source.read(reference.index).content)
        except (DecodeError, ShardError, OSError, ValueError) as error:
            raise SampleError(reference, source.keys(reference.index), str(error)) from error
        generator = None
        if self.augment:
            generator = sample_generator(self.seed, reference.epoch, reference.index, "augment", reference.source)
        return view_image(image, self.data, generator)


def _to(batch: Batch, device: torch.device | str) -> Batch:
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)  # type: ignore[arg-type]  # the names are those of its own tensor fields
