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


def test_parts_have_the_area_and_shape_that_are_asked_for() -> None:
    rows, columns = torch.meshgrid(torch.arange(120), torch.arange(200), indexing="ij")
    pixels = torch.stack([rows, columns, rows]).to(torch.uint8)
    data = DataConfig(image_size=32, crop_scale=(0.25, 0.5), crop_ratio=(0.5, 2.0), flip=False)
    areas, shapes, places = [], [], set()
    for index in range(200):
        view = view_image(pixels, data, sample_generator(0, 0, index, "augment")) * 255
        assert view.shape == (3, 32, 32)
        # What a row or column stands for grows evenly over the part; antialiasing averages at its borders.
        high, wide = (float(view[0, 24, 0] - view[0, 8, 0]) * 2, float(view[1, 0, 24] - view[1, 0, 8]) * 2)
        areas.append(high * wide / (120 * 200))
        shapes.append(wide / high)
        places.add((int(view[0].min()), int(view[1].min())))
    assert 0.22 < min(areas) < 0.3
    assert 0.45 < max(areas) < 0.53
    assert 0.45 < min(shapes) < 0.65
    assert 1.6 < max(shapes) < 2.2
    assert len(places) > 100
    again = [view_image(pixels, data, sample_generator(0, 0, 3, "augment")) for _ in range(2)]
    assert torch.equal(*again)


def test_without_a_generator_there_is_the_centre_and_a_narrow_image_gives_its_middle() -> None:
    pixels = torch.arange(60, dtype=torch.uint8).expand(3, 40, 60)
    data = DataConfig(image_size=40, crop_scale=(0.1, 0.2), flip=False)
    assert torch.equal(view_image(pixels, data, None), pixels[:, :, 10:50] / 255)
    narrow = torch.arange(200, dtype=torch.uint8).view(200, 1).expand(3, 200, 10)
    tall = DataConfig(image_size=8, crop_scale=(1.0, 1.0), flip=False)  # no such part has an allowed shape
    view = view_image(narrow, tall, sample_generator(0, 0, 0, "augment")) * 255
    assert 92 <= float(view.min()) <= float(view.max()) <= 107


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_scale": (0.5, 0.2)}, r"crop_scale=\[0.5, 0.2\]: use least and most, above 0 and up to 1"),
        ({"crop_scale": (0.5, 1.2)}, "up to 1"),
        ({"crop_ratio": (0.0, 1.0)}, r"crop_ratio=\[0.0, 1.0\]: use least and most, above 0 "),
        ({"crop_scale": (0.5, 1.0), "random_crop": False}, "means nothing with random_crop=false"),
        ({"crop_scale": (0.5, 1.0), "fit": "stretch"}, "means nothing for fit=stretch"),
    ],
)
def test_crops_that_mean_nothing_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


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
