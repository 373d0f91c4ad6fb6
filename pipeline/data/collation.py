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

from pipeline.data.audio import DecodeError, decode_audio, normalise_
from pipeline.data.config import SAMPLE_RATE, DataConfig
from pipeline.data.dataset import Member
from pipeline.data.image import decode_image, view_image
from pipeline.data.index import ShardError
from pipeline.data.masking import MaskingConfig, batch_masks, conv_frames, draw_negatives
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
    negatives: Tensor  # (batch, max_masked, negatives) int16, or int32 if a clip has more masked frames than it counts
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

    def classes(self, number: int) -> Tensor:
        """The labels, for a net that knows ``number`` classes. Raises ValueError for an image without a class of
        these."""
        wrong = (self.labels < 0) | (self.labels >= number)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            label = int(self.labels[place])
            if label < 0:
                raise ValueError(
                    f"image {self.keys[place]} has no label: train on a data set that `tessera prepare images` made of "
                    "a tree with a folder for each class"
                )
            raise ValueError(
                f"image {self.keys[place]} is of class {label}, the net has model.classes={number}: use "
                f"model.classes={label + 1} or more"
            )
        return self.labels

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
        members = [_read(reference, dataset) for reference in references]
        waveforms, lengths = self.clips(references, members)
        frame_lengths = [self.frames(length) for length in lengths]
        mask = _empty((len(members), self.frames(max(lengths))), torch.bool).zero_()
        generators = [self._generator(reference, "mask") for reference in references]
        masked = []
        for row, of_clip in zip(mask.numpy(), batch_masks(frame_lengths, self.masking, generators), strict=True):
            row[: len(of_clip)] = of_clip
            masked.append(int(np.count_nonzero(of_clip)))
        # Most of what a batch holds beside sound: int64 would take longer to write than to draw.
        word = torch.int16 if max(masked) <= 1 << 15 else torch.int32
        negatives = _empty((len(members), max(masked), self.masking.negatives), word)
        for row, generator, targets in zip(negatives.numpy(), generators, masked, strict=True):
            draw_negatives(targets, self.masking.negatives, generator, out=row[:targets])
            row[targets:] = 0
        return SpeechBatch(
            waveforms=waveforms,
            lengths=torch.tensor(lengths),
            mask=mask,
            frame_lengths=torch.tensor(frame_lengths),
            negatives=negatives,
            keys=[member.key for member in members],
            step=step,
            number=number,
            targets=sum(masked),
            seconds=sum(lengths) / SAMPLE_RATE,
        )

    def clips(self, references: Sequence[SampleReference], members: Sequence[Member]) -> tuple[Tensor, list[int]]:
        """The samples decoded, cropped, normalised and padded: float32 ``(batch, time)`` and their lengths."""
        lengths = [
            min(reference.limit or member.length, member.length)
            for reference, member in zip(references, members, strict=True)
        ]
        waveforms = _empty((len(members), max(lengths)), torch.float32)
        for row, reference, member, length in zip(waveforms.numpy(), references, members, lengths, strict=True):
            self._decode(reference, member, row[:length])
            row[length:] = 0
        return waveforms, lengths

    def frames(self, samples: int) -> int:
        """Frames that the encoder makes of so many audio samples."""
        return conv_frames(samples, self.conv_layers)

    def _generator(self, reference: SampleReference, stream: str) -> np.random.Generator:
        return sample_generator(self.seed, reference.epoch, reference.index, stream, reference.source)

    def _decode(self, reference: SampleReference, member: Member, out: np.ndarray) -> None:
        """Fill ``out`` with a crop of its length, wherever the sample's generator says."""
        spare = member.length - len(out)
        start = int(self._generator(reference, "crop").integers(spare + 1)) if spare else 0
        try:
            decode_audio(member.content, start, len(out), out)
        except DecodeError as error:
            raise SampleError(reference, member.key, str(error)) from error
        if self.data.normalise:
            normalise_(out)


class ImageCollation:
    """Decode, resize, crop, mirror and augment; without ``augment`` the centre crop, as it is."""

    def __init__(self, data: DataConfig, seed: int, augment: bool = True) -> None:
        self.data = data
        self.seed = seed
        self.augment = augment

    def __call__(
        self, references: Sequence[SampleReference], dataset: Data, step: int = 0, number: int = 0
    ) -> ImageBatch:
        """The batch of these references, in their order."""
        members = [_read(reference, dataset) for reference in references]
        pixels = _empty((len(members), 3, self.data.image_size, self.data.image_size), torch.float32)
        for view, reference, member in zip(pixels, references, members, strict=True):
            self._view(reference, member, view)
        return ImageBatch(
            pixels=pixels,
            labels=torch.tensor([member.label for member in members]),
            keys=[member.key for member in members],
            step=step,
            number=number,
            targets=pixels.numel(),
        )

    def _view(self, reference: SampleReference, member: Member, out: Tensor) -> None:
        try:
            image = decode_image(member.content)
        except DecodeError as error:
            raise SampleError(reference, member.key, str(error)) from error
        generator = None
        if self.augment:
            generator = sample_generator(self.seed, reference.epoch, reference.index, "augment", reference.source)
        view_image(image, self.data, generator, out)


def _read(reference: SampleReference, dataset: Data) -> Member:
    """The sample's bytes. A shard that is damaged is the sample's fault; a disk or a store that fails is not, and stops
    the run: what took the sample's place would not be there again when it is repeated.
    """
    source = dataset.sources[reference.source]
    try:
        return source.read(reference.index)
    except ShardError as error:
        raise SampleError(reference, source.keys(reference.index), str(error)) from error
    except OSError as error:
        error.add_note(f"while reading sample {reference.index} of split {source.split!r} of {source.path}")
        raise


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a batch, pinned where a GPU may fetch it while it computes."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_available())


def _to(batch: Batch, device: torch.device | str) -> Batch:
    tensors = {
        field.name: value.to(device, non_blocking=True)
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor)
    }
    return replace(batch, **tensors)  # type: ignore[arg-type]  # the names are those of its own tensor fields
