"""Images from bytes to the square that the model sees."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from pipeline.data import DataConfig, sample_generator
from pipeline.data.audio import DecodeError
from pipeline.data.image import decode_image, view_image


def photographs(source: Path) -> list[bytes]:
    """The bundled JPEG files that are whole."""
    files = sorted(source.rglob("*.jpg"))
    return [path.read_bytes() for path in files if path.stat().st_size > 4096]


def jpeg(image: Image.Image, form: str = "JPEG") -> bytes:
    target = io.BytesIO()
    image.save(target, form)
    return target.getvalue()


def test_decoders_agree_and_the_fallback_reads_what_torchvision_refuses(image_source: Path) -> None:
    content = photographs(image_source)[0]
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


def test_stretching_cuts_nothing_off() -> None:
    """And a picture that has the size keeps every bit, as cropping it would."""
    rows, columns = torch.meshgrid(torch.arange(40), torch.arange(60), indexing="ij")
    pixels = torch.stack([rows, columns, rows + columns]).to(torch.uint8)
    data = DataConfig(image_size=32, fit="stretch", flip=False)
    view = view_image(pixels, data, sample_generator(0, 0, 0, "augment"))
    assert view.shape == (3, 32, 32)
    for axis, length in ((1, 40), (2, 60)):
        seen = view[axis - 1].mean(dim=2 - axis) * 255
        expected = (torch.arange(32) + 0.5) * length / 32 - 0.5  # centres of the new pixels
        assert (seen - expected)[2:-2].abs().max() < 1  # bytes; at the borders there is less to average
    same = DataConfig(image_size=40, fit="stretch", flip=False)
    assert torch.equal(view_image(pixels[:, :, :40], same, None) * 255, pixels[:, :, :40].float())
    with pytest.raises(ValueError, match=r"resize=40 means nothing for fit=stretch, which crops nothing: leave it out"):
        DataConfig(image_size=32, resize=40, fit="stretch")


@pytest.mark.parametrize("size", [32, 100, 300])
def test_resizing_as_bytes_is_off_by_rounding_alone(image_source: Path, size: int) -> None:
    data = DataConfig(image_size=size, random_crop=False, flip=False)
    for content in photographs(image_source)[:8]:
        pixels = decode_image(content)
        side = min(pixels.shape[1:])
        shape = [max(size, round(length * size / side)) for length in pixels.shape[1:]]
        exact = functional.interpolate(pixels[None] / 255, size=shape, mode="bilinear", antialias=True)[0].clamp(0, 1)
        top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
        exact = exact[:, top : top + size, left : left + size]
        assert (view_image(pixels, data, None) - exact).abs().max() * 255 < 1.01


def test_a_view_is_written_where_it_belongs(image_source: Path) -> None:
    pixels = decode_image(photographs(image_source)[0])
    batch = torch.zeros(2, 3, 48, 48)
    view = view_image(pixels, DataConfig(image_size=48), sample_generator(0, 0, 0, "augment"), batch[1])
    assert view.data_ptr() == batch[1].data_ptr()
    assert torch.equal(batch[1], view_image(pixels, DataConfig(image_size=48), sample_generator(0, 0, 0, "augment")))
    assert not batch[0].any()
