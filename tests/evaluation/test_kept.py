"""What of an evaluation is kept by the next one, which did not ask for it."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.evaluation.kept import dropped_measures, keep_measures

NOW: dict[str, Any] = {
    "step": 4,
    "weights": "trained",
    "data": "/data",
    "content": "c0ffee",
    "split": "validation",
    "samples": 29,
    "psnr": 20.0,
}
INCEPTION = {"inception": {"file": "inception.pth", "sha256": "1"}}
LPIPS = {"alexnet": {"file": "alexnet.pth", "sha256": "2"}, "lpips_heads": {"file": "torchmetrics", "sha256": "3"}}
BEFORE: dict[str, Any] = {**NOW, "psnr": 19.0, "rfid": 7.0, "lpips": 0.5, "networks": INCEPTION | LPIPS}


def test_measures_of_the_same_weights_and_data_are_kept_with_their_files() -> None:
    kept = keep_measures(BEFORE, NOW)
    assert kept == {**NOW, "rfid": 7.0, "lpips": 0.5, "networks": INCEPTION | LPIPS}
    assert dropped_measures(BEFORE, kept) == []
    assert keep_measures({}, NOW) == NOW


@pytest.mark.parametrize(
    ("key", "before", "told"),
    [
        ("step", 2, "the checkpoint of step 2, not 4"),
        ("weights", "averaged", "the averaged weights, not trained"),
        ("data", "/other", "the data set /other, not /data"),
        ("content", "bad", "data with the fingerprint bad, not c0ffee"),
        ("split", "train", "the train split, not validation"),
        ("samples", 8, "8 samples, not 29"),
    ],
)
def test_measures_of_something_else_are_dropped_and_said(key: str, before: Any, told: str) -> None:
    kept = keep_measures({**BEFORE, key: before}, NOW)
    assert kept == NOW
    assert dropped_measures({**BEFORE, key: before}, kept) == [
        f"{name} of the evaluation before dropped, measured on {told}: {option} measures again"
        for name, option in (("rFID", "--inception-weights"), ("LPIPS", "--lpips-weights"))
    ]


def test_what_is_measured_anew_replaces_all_that_the_option_gave_before() -> None:
    other = {"vgg16": {"file": "vgg16.pth", "sha256": "4"}, "lpips_heads": {"file": "heads.pth", "sha256": "5"}}
    kept = keep_measures(BEFORE, {**NOW, "lpips": 0.4, "networks": other})
    assert kept == {**NOW, "rfid": 7.0, "lpips": 0.4, "networks": INCEPTION | other}
    torchvision = {"inception": {"file": "torchvision.pth", "sha256": "6"}}
    kept = keep_measures(BEFORE, {**NOW, "rfid_torchvision": 9.0, "networks": torchvision})
    assert kept == {**NOW, "lpips": 0.5, "rfid_torchvision": 9.0, "networks": torchvision | LPIPS}
    assert dropped_measures(BEFORE, kept) == []
