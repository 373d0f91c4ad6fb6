"""Span masks and negatives: their statistics, and what they must never do."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.data import MaskingConfig, sample_generator
from pipeline.data.masking import (
    MINIMUM_FRAMES,
    batch_masks,
    conv_frames,
    draw_negatives,
    samples_for,
    span_mask,
)

WAV2VEC2_LAYERS = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]


def runs(mask: np.ndarray) -> np.ndarray:
    """Lengths of the runs of True."""
    edges = np.diff(np.concatenate([[0], mask.astype(int), [0]]))
    return np.flatnonzero(edges == -1) - np.flatnonzero(edges == 1)


def test_statistics_are_those_of_the_paper_at_15_6_seconds() -> None:
    """wav2vec 2.0, section 4.2: about 49 % of all frames are masked, in runs of 14.7 frames (299 ms) on average."""
    masks = [span_mask(780, MaskingConfig(), sample_generator(0, 0, index, "mask")) for index in range(2000)]
    assert np.mean([mask.mean() for mask in masks]) == pytest.approx(0.49, abs=0.005)
    assert np.concatenate([runs(mask) for mask in masks]).mean() == pytest.approx(14.7, abs=0.2)


def masks_of(mode: str, frames: list[int], batch: int) -> list[np.ndarray]:
    config = MaskingConfig.model_validate({"mode": mode})
    generators = [sample_generator(0, batch, row, "mask") for row in range(len(frames))]
    return batch_masks(frames, config, generators)


def test_the_same_count_punctures_spans_as_fairseq_does() -> None:
    """Measured of fairseq and fairseq2 at 8 clips of 15.6 s: .456 of the frames, in runs of 7.6 to 7.8."""
    masks = []
    for batch in range(250):
        rows = masks_of("same_count", [780] * 8, batch)
        assert len({int(mask.sum()) for mask in rows}) == 1
        masks += rows
    assert np.mean([mask.mean() for mask in masks]) == pytest.approx(0.456, abs=0.005)
    assert np.concatenate([runs(mask) for mask in masks]).mean() == pytest.approx(7.7, abs=0.2)


def test_the_same_count_only_unmasks() -> None:
    """Clips too short for a mask do not unmask the others."""
    frames = [300, 3, 120, 0, 80]
    ragged, same = masks_of("ragged", frames, 0), masks_of("same_count", frames, 0)
    least = min(int(mask.sum()) for mask in ragged if mask.any())
    assert [int(mask.sum()) for mask in same] == [least, 0, least, 0, least]
    assert all((whole | trimmed == whole).all() for whole, trimmed in zip(ragged, same, strict=True))
    assert masks_of("same_count", [3, 0], 0)[0].tolist() == [False] * 3


@settings(max_examples=200, deadline=None)
@given(
    frames=st.integers(0, 400),
    probability=st.floats(0.05, 1.0),
    length=st.integers(1, 20),
    spans=st.integers(2, 4),
    seed=st.integers(0, 2**63),
)
def test_masks_are_whole_spans_and_leave_a_negative(
    frames: int, probability: float, length: int, spans: int, seed: int
) -> None:
    config = MaskingConfig(probability=probability, length=length, minimum_spans=spans)
    mask = span_mask(frames, config, sample_generator(seed, 0, 0, "mask"))
    assert mask.shape == (frames,)
    if frames < MINIMUM_FRAMES:
        assert not mask.any()
        return
    assert mask.sum() >= 2
    assert runs(mask).min() >= min(length, frames // 2)


def test_number_of_spans_is_right_on_average_where_it_must_be_rounded() -> None:
    config = MaskingConfig(probability=0.65, length=1, minimum_spans=2)  # spans of one frame can be counted
    counts = [span_mask(11, config, sample_generator(0, 0, index, "mask")).sum() for index in range(4000)]
    assert set(counts) == {7, 8}
    assert np.mean(counts) == pytest.approx(0.65 * 11, abs=0.03)


@settings(max_examples=100, deadline=None)
@given(masked=st.integers(0, 80), negatives=st.integers(1, 120), seed=st.integers(0, 2**63))
def test_negatives_are_other_masked_frames(masked: int, negatives: int, seed: int) -> None:
    drawn = draw_negatives(masked, negatives, sample_generator(seed, 0, 0, "negatives"))
    assert drawn.dtype == np.int64
    if masked < 2:
        assert drawn.shape == (0, negatives)
        return
    assert drawn.shape == (masked, negatives)
    assert ((drawn >= 0) & (drawn < masked)).all()
    assert (drawn != np.arange(masked)[:, None]).all()


def test_negatives_are_uniform_over_the_others() -> None:
    drawn = draw_negatives(5, 40_000, sample_generator(1, 0, 0, "negatives"))
    for row in range(5):
        share = np.bincount(drawn[row], minlength=5) / 40_000
        assert share[row] == 0
        assert np.delete(share, row) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("samples", "frames"), [(249_600, 779), (16_000, 49), (400, 1), (399, 0), (0, 0), (1600, 4)])
def test_frames_of_the_wav2vec2_feature_extractor(samples: int, frames: int) -> None:
    assert conv_frames(samples, WAV2VEC2_LAYERS) == frames


@pytest.mark.parametrize("frames", [1, 2, 4, 50])
def test_samples_are_the_fewest_for_so_many_frames(frames: int) -> None:
    samples = samples_for(frames, WAV2VEC2_LAYERS)
    assert [conv_frames(count, WAV2VEC2_LAYERS) for count in (samples - 1, samples)] == [frames - 1, frames]


def test_frames_are_those_that_torch_makes() -> None:
    import torch

    layers = [(3, 7, 3), (4, 3, 2), (2, 2, 2)]
    signal = torch.zeros(1, 1, 101)
    channels = 1
    for dim, kernel, stride in layers:
        signal = torch.nn.functional.conv1d(signal, torch.zeros(dim, channels, kernel), stride=stride)
        channels = dim
    assert conv_frames(101, layers) == signal.shape[-1]


def test_a_configuration_that_may_mask_one_frame_is_refused() -> None:
    with pytest.raises(ValidationError, match="may mask a single frame"):
        MaskingConfig(length=1, minimum_spans=1)
