"""RandAugment and random erasing: torchvision's operations, timm's rectangles, and each sample's own draws."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import RandAugment

from pipeline.data import DataConfig, ImageCollation, SampleReference, ShardedDataset, sample_generator
from pipeline.data.augmentation import NOISE_DEVIATION, NOISE_MEAN, OPERATIONS, erase_, rand_augment
from pipeline.data.image import view_image
from recipes.schema import RecipeError, load_recipe

AUGMENTED = {"image_size": 32, "crop_scale": (0.08, 1.0), "rand_augment": 2, "erasing": 0.25}


def noise(height: int, width: int) -> Tensor:
    """Pixels that no operation but the identity leaves alone."""
    values = np.random.default_rng(0).integers(10, 240, (3, height, width), dtype=np.uint8)
    return torch.from_numpy(values)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torchvision(name: str) -> None:
    """By the same magnitudes: its own, rounded to fp32, make one level of 255 where a factor's product is cut."""
    theirs = RandAugment()
    assert list(OPERATIONS) == list(theirs._AUGMENTATION_SPACE)
    by_magnitude, signed = theirs._AUGMENTATION_SPACE[name]
    assert OPERATIONS[name].signed == signed
    for side in ((32, 32), (40, 56), (224, 224)):
        pixels = noise(*side)
        magnitudes = by_magnitude(31, *side)
        for magnitude in (1, 7, 9, 30):
            for sign in (1, -1) if signed else (1,):
                value = 0.0 if magnitudes is None else sign * float(magnitudes[magnitude])
                expected = theirs._apply_image_or_video_transform(
                    pixels, name, value, InterpolationMode.NEAREST, theirs._fill
                )
                changed = OPERATIONS[name].apply(pixels, sign * magnitude / 30)
                assert (changed.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_change_an_image_and_keep_its_form(name: str) -> None:
    pixels = noise(32, 32)
    before = pixels.clone()
    for strength in (0.3, -0.3) if OPERATIONS[name].signed else (0.3,):
        changed = OPERATIONS[name].apply(pixels, strength)
        assert (changed.shape, changed.dtype) == (pixels.shape, torch.uint8)
        assert torch.equal(changed, before) == (name == "Identity")
    assert torch.equal(pixels, before)


def test_each_operation_and_direction_is_drawn_as_often() -> None:
    pixels = noise(32, 32)
    share = {}
    for operation in OPERATIONS.values():
        for sign in (1, -1) if operation.signed else (1,):
            result = operation.apply(pixels, sign * 0.5).numpy().tobytes()
            share[result] = 1 / len(OPERATIONS) / (2 if operation.signed else 1)
    drawn = dict.fromkeys(share, 0)
    for index in range(3000):
        drawn[rand_augment(pixels, 1, 15, sample_generator(0, 0, index, "augment")).numpy().tobytes()] += 1
    chi_squared = sum((drawn[each] - 3000 * share[each]) ** 2 / (3000 * share[each]) for each in share)
    assert len(share) == 23
    assert chi_squared < 48  # 22 degrees of freedom: one seed in a thousand has more
    generator = sample_generator(0, 0, 0, "augment")
    one_by_one = rand_augment(rand_augment(pixels, 1, 9, generator), 1, 9, generator)
    assert torch.equal(rand_augment(pixels, 2, 9, sample_generator(0, 0, 0, "augment")), one_by_one)


def test_rectangles_are_erased_as_often_and_as_large_as_asked_for() -> None:
    areas, ratios, values = [], [], []
    for index in range(2000):
        pixels = torch.full((3, 48, 48), 2.0)
        erase_(pixels, 0.25, sample_generator(0, 0, index, "augment"))
        erased = pixels[0] != 2
        if erased.any():
            rows, columns = erased.any(dim=1).sum().item(), erased.any(dim=0).sum().item()
            assert int(erased.sum()) == rows * columns  # a rectangle, in all channels
            assert torch.equal(pixels[1] != 2, erased)
            areas.append(rows * columns / 48**2)
            ratios.append(rows / columns)
            values.append(pixels[pixels != 2])
    assert len(areas) / 2000 == pytest.approx(0.25, abs=0.03)  # three standard deviations
    assert 0.015 < min(areas) < 0.03
    assert 0.30 < max(areas) < 0.35
    assert 0.25 < min(ratios) < 0.4
    assert 2.5 < max(ratios) < 4
    pixels = torch.cat(values)
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert float(pixels.mean()) == pytest.approx(NOISE_MEAN, abs=0.01)
    assert float(pixels.std()) == pytest.approx(NOISE_DEVIATION, abs=0.01)


def test_what_is_drawn_is_the_samples_own(image_dataset: Path) -> None:
    """Neither neighbours, nor other threads, nor the process's seed change a bit; the epoch does."""
    dataset = ShardedDataset(image_dataset)
    collation = ImageCollation(DataConfig(**AUGMENTED), seed=3)
    references = [SampleReference(index, 1) for index in range(12)]
    torch.manual_seed(0)
    batch = collation(references, dataset).pixels
    assert batch.dtype == torch.float32
    assert 0 <= batch.min() <= batch.max() <= 1
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(collation(references[::-1], dataset).pixels.flip(0), batch)
    assert torch.equal(torch.get_rng_state(), state)
    with ThreadPoolExecutor(4) as pool:
        alone = list(pool.map(lambda reference: collation([reference], dataset).pixels[0], references))
    assert torch.equal(torch.stack(alone), batch)
    assert not torch.equal(collation([SampleReference(0, 2)], dataset).pixels[0], batch[0])


def test_other_draws_stay_as_they_were(image_dataset: Path) -> None:
    """An image has the same crop and mirroring with and without these options, and evaluation knows none of it."""
    dataset = ShardedDataset(image_dataset)
    references = [SampleReference(index, 0) for index in range(12)]
    plain, erased, still, evaluated = (
        ImageCollation(DataConfig(image_size=48, resize=64, **options), 0, augment)(references, dataset).pixels
        for options, augment in (
            ({}, True),
            ({"erasing": 1.0, "rand_augment": 1, "rand_augment_magnitude": 0}, True),
            ({}, False),
            ({"erasing": 1.0, "rand_augment": 2}, False),
        )
    )
    assert torch.equal(evaluated, still)
    # Of magnitude 0, 12 of 14 operations change nothing, and two thirds of an image are never erased.
    same = [(ours == theirs).float().mean().item() for ours, theirs in zip(erased, plain, strict=True)]
    assert all(share < 1 for share in same)
    assert sum(share > 0.6 for share in same) >= 9
    # What a recipe without the options draws, by hand.
    pixels = noise(40, 60)
    for index in range(8):
        view = view_image(pixels, DataConfig(image_size=32, resize=40), sample_generator(0, 0, index, "augment"))
        generator = sample_generator(0, 0, index, "augment")
        top, left = int(generator.integers(9)), int(generator.integers(29))
        expected = pixels[:, top : top + 32, left : left + 32] / 255
        assert torch.equal(view, expected.flip(2) if generator.random() < 0.5 else expected)


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "flowers17", "flowers102", "medmnist", "tiny_imagenet", "svhn"]
)
def test_classification_is_augmented_as_published(name: str) -> None:
    data = load_recipe(f"som/vit_som_{name}").data
    assert (data.crop_scale, data.crop_ratio, data.flip) == ((0.08, 1), (3 / 4, 4 / 3), True)
    assert (data.rand_augment, data.rand_augment_magnitude, data.erasing) == (2, 9, 0.25)


@pytest.mark.parametrize(
    ("override", "accepted"),
    [
        ("data.rand_augment=-1", "greater than or equal to 0"),
        ("data.rand_augment=1.5", "valid integer"),
        ("data.rand_augment_magnitude=31", "less than or equal to 30"),
        ("data.rand_augment_magnitude=-1", "greater than or equal to 0"),
        ("data.erasing=25", "less than or equal to 1"),
        ("data.erasing=-0.1", "greater than or equal to 0"),
    ],
)
def test_values_out_of_range_are_refused(override: str, accepted: str) -> None:
    with pytest.raises(RecipeError, match=accepted) as refusal:
        load_recipe("som/vit_som_cifar10", [override])
    assert override in str(refusal.value)
