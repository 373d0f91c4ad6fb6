"""A clip taken in windows has the codes of the clip taken whole."""

import pytest
import torch

from pipeline.export.clip_codes import _features, clip_codes
from tests.models.speech import make_batch, tiny_model

LAYOUTS = {"base": {"conv_norm": "group"}, "large": {"conv_norm": "layer", "norm_order": "pre"}}


def uneven_clip(model, samples):
    """Loud at its end, so that moments of a window are not those of the clip."""
    waveform = make_batch(model.config, [samples]).waveforms[0]
    return waveform * torch.linspace(0.05, 1.0, samples) ** 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 7, 50, 92, 93, 1000])
def test_windows_give_the_codes_of_the_whole_clip(layout, window):
    model = tiny_model({"kind": "ema", "codes": 32}, **LAYOUTS[layout]).eval()
    waveform = uneven_clip(model, 30_000)  # 93 frames
    batch = make_batch(model.config, [30_000])
    batch.waveforms[0] = waveform
    expected, frames = model.encode_codes(batch)
    assert expected.unique().numel() > 3
    codes = clip_codes(model, waveform, window)
    assert codes.shape == (int(frames[0]), 1) == (93, 1)
    assert torch.equal(codes, expected[0])
    # The model is as it was: nothing of the clip's moments stays.
    assert torch.equal(model.encode_codes(batch)[0], expected)


@torch.no_grad()
def test_moments_of_windows_would_give_other_codes():
    """What the sum over all windows is for: BASE's group norm in each window alone."""
    model = tiny_model({"kind": "ema", "codes": 32}, **LAYOUTS["base"]).eval()
    waveform = uneven_clip(model, 30_000)
    whole = clip_codes(model, waveform)
    alone = model.quantizer.encode(_features(model, waveform[: 10 * 320 + 80]))[0]
    assert not torch.equal(alone, whole[:10])
    assert torch.equal(clip_codes(model, waveform, 10)[:10], whole[:10])


def test_a_clip_without_a_frame_is_refused():
    model = tiny_model({"kind": "ema", "codes": 32}).eval()
    assert clip_codes(model, torch.randn(400)).shape == (1, 1)
    with pytest.raises(ValueError, match="the clip has 399 audio samples, a frame takes 400"):
        clip_codes(model, torch.randn(399))
