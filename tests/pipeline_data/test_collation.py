"""From bytes to tensors: what is cropped, padded, masked and mirrored, and that it is the sample's own doing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from pipeline.data import DataConfig, ImageCollation, MaskingConfig, SampleReference, ShardedDataset, SpeechCollation
from pipeline.data.randomness import sample_generator

LAYERS = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]


def speech_collation(**data: object) -> SpeechCollation:
    return SpeechCollation(DataConfig(**data), MaskingConfig(negatives=20), LAYERS, seed=3)


def test_a_crop_is_a_piece_of_the_whole_clip(speech_dataset: Path) -> None:
    dataset = ShardedDataset(speech_dataset)
    collation = speech_collation(normalise=False)
    for epoch in range(4):
        batch = collation([SampleReference(5, epoch, 12_000)], dataset)
        whole, _ = soundfile.read(io.BytesIO(dataset.read(5).content), dtype="float32")
        start = int(sample_generator(3, epoch, 5, "crop").integers(len(whole) - 12_000 + 1))
        assert np.array_equal(batch.waveforms[0].numpy(), whole[start : start + 12_000])


def test_rows_do_not_depend_on_their_neighbours(speech_dataset: Path) -> None:
    """Rule 2: alone or among others, a clip has the same samples, mask and negatives."""
    dataset = ShardedDataset(speech_dataset)
    collation = speech_collation()
    references = [SampleReference(index, 1) for index in (7, 0, 12)]
    batch = collation(references, dataset)
    for row, reference in enumerate(references):
        alone = collation([reference], dataset)
        length, frames = int(alone.lengths[0]), int(alone.frame_lengths[0])
        masked = int(alone.mask.sum())
        assert torch.equal(batch.waveforms[row, :length], alone.waveforms[0])
        assert torch.equal(batch.mask[row, :frames], alone.mask[0])
        assert torch.equal(batch.negatives[row, :masked], alone.negatives[0])


def test_clips_of_a_micro_batch_may_be_given_equally_many_targets(speech_dataset: Path) -> None:
    """For comparison with fairseq: then negatives are drawn among what is left masked."""
    dataset = ShardedDataset(speech_dataset)
    masking = MaskingConfig(negatives=20, mode="same_count")
    references = [SampleReference(index, 1) for index in (7, 0, 12)]
    batch = SpeechCollation(DataConfig(), masking, LAYERS, seed=3)(references, dataset)
    ragged = speech_collation()(references, dataset)
    counts = batch.mask.sum(dim=1)
    assert counts.tolist() == [int(ragged.mask.sum(dim=1).min())] * 3
    assert not (batch.mask & ~ragged.mask).any()
    assert batch.negatives.shape == (3, int(counts[0]), 20)
    assert int(batch.negatives.max()) < int(counts[0])


def test_padding_is_zero_and_never_masked_nor_a_negative(speech_dataset: Path) -> None:
    dataset = ShardedDataset(speech_dataset)
    batch = speech_collation()([SampleReference(index, 0) for index in range(12)], dataset)
    assert batch.waveforms.dtype == torch.float32
    assert batch.mask.shape == (12, int(batch.frame_lengths.max()))
    assert batch.targets == int(batch.mask.sum())
    for row in range(12):
        assert not batch.waveforms[row, int(batch.lengths[row]) :].any()
        assert not batch.mask[row, int(batch.frame_lengths[row]) :].any()
        masked = int(batch.mask[row].sum())
        negatives = batch.negatives[row, :masked]
        assert negatives.min() >= 0
        assert negatives.max() < masked
        assert (negatives != torch.arange(masked)[:, None]).all()
        clip = batch.waveforms[row, : int(batch.lengths[row])]
        assert abs(clip.mean().item()) < 1e-3
        assert clip.std().item() == pytest.approx(1, abs=0.02)
    assert batch.seconds == pytest.approx(float(batch.lengths.sum()) / 16_000)


def test_images_are_labelled_and_counted(image_dataset: Path) -> None:
    dataset = ShardedDataset(image_dataset)
    batch = ImageCollation(DataConfig(image_size=32), seed=0)([SampleReference(i, 0) for i in range(6)], dataset, 4, 1)
    assert batch.pixels.shape == (6, 3, 32, 32)
    assert batch.targets == 6 * 3 * 32 * 32
    assert (batch.step, batch.number) == (4, 1)
    classes = [dataset.manifest.classes[label] for label in batch.labels]
    assert classes == [key.split("/")[0] for key in batch.keys]
    still = ImageCollation(DataConfig(image_size=32), seed=0, augment=False)
    first, second = (still([SampleReference(0, epoch)], dataset).pixels for epoch in (0, 1))
    assert torch.equal(first, second)


def test_batches_move_whole(image_dataset: Path, speech_dataset: Path) -> None:
    images = ImageCollation(DataConfig(), 0)([SampleReference(0, 0)], ShardedDataset(image_dataset))
    speech = speech_collation()([SampleReference(0, 0)], ShardedDataset(speech_dataset))
    assert images.to("meta").pixels.is_meta
    assert all(tensor.is_meta for tensor in vars(speech.to("meta")).values() if isinstance(tensor, torch.Tensor))
    assert speech.to("meta").keys == speech.keys
