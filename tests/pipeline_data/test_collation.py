"""From bytes to tensors: what is cropped, padded, masked and mirrored, and that it is the sample's own doing."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from pipeline.data import DataConfig, ImageCollation, MaskingConfig, SampleReference, ShardedDataset, SpeechCollation
from pipeline.data.audio import DecodeError, decode_audio, normalise
from pipeline.data.image import decode_image, view_image
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


def test_stereo_is_averaged_and_a_cut_file_is_an_error() -> None:
    target = io.BytesIO()
    left, right = np.full(800, 0.5), np.full(800, -0.25)
    soundfile.write(target, np.stack([left, right], axis=1), 16_000, "PCM_16", format="WAV")
    assert decode_audio(target.getvalue()) == pytest.approx(0.125, abs=1e-4)
    with pytest.raises(DecodeError, match="ends after 800 of 900"):
        decode_audio(target.getvalue(), 0, 900)
    with pytest.raises(DecodeError, match="not decodable as audio"):
        decode_audio(b"no sound")


def test_normalising_silence_is_silence() -> None:
    assert not normalise(np.full(100, 0.25, dtype=np.float32)).any()


def jpeg(image: Image.Image, form: str = "JPEG") -> bytes:
    target = io.BytesIO()
    image.save(target, form)
    return target.getvalue()


def test_decoders_agree_and_the_fallback_reads_what_torchvision_refuses(image_dataset: Path) -> None:
    content = ShardedDataset(image_dataset).read(0).content
    with Image.open(io.BytesIO(content)) as image:
        reference = np.array(image.convert("RGB")).astype(int)
    assert np.abs(decode_image(content).permute(1, 2, 0).numpy() - reference).max() <= 4
    red = Image.new("RGB", (20, 10), (200, 30, 30))
    cmyk = decode_image(jpeg(red.convert("CMYK")))
    assert cmyk.shape == (3, 10, 20)
    assert cmyk[0].float().mean() > 150
    assert cmyk[1].float().mean() < 80
    assert decode_image(jpeg(Image.new("L", (9, 8), 77)))[1, 4, 4] == 77
    transparent = decode_image(jpeg(Image.new("RGBA", (9, 8), (0, 0, 0, 0)), "PNG"))
    assert transparent.min() == 255
    with pytest.raises(DecodeError, match="not decodable as an image"):
        decode_image(b"\xff\xd8 no picture")


def test_the_view_follows_the_policy() -> None:
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    pixels = torch.stack([rows, columns, rows + columns]).to(torch.uint8)
    centre = view_image(pixels, DataConfig(image_size=40, random_crop=False, flip=False), None)
    assert centre.shape == (3, 40, 40)
    assert torch.equal((centre[1] * 255).round()[0], torch.arange(10, 50).float())
    corners = set()
    for index in range(40):
        data = DataConfig(image_size=32, resize=40)
        view = view_image(pixels, data, sample_generator(0, 0, index, "augment"))
        columns_seen = (view[1] * 255).round()[0]
        mirrored = bool(columns_seen[0] > columns_seen[-1])
        assert len(columns_seen) == 32
        corners.add((int((view[0] * 255).round()[0, 0]), int(columns_seen.min()), mirrored))
    assert len({top for top, _, _ in corners}) > 4
    assert len({left for _, left, _ in corners}) > 8
    assert {mirrored for _, _, mirrored in corners} == {True, False}
    small = view_image(pixels, DataConfig(image_size=64), None)
    assert small.shape == (3, 64, 64)
    assert small.min() >= 0
    assert small.max() <= 1


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
