"""Our encoder in transformers and in torchaudio: the same weights under other names, and the same features."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchaudio.models.wav2vec2.utils import import_huggingface_model
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Model

from pipeline.data.audio import decode_audio, normalise
from pipeline.data.masking import span_mask
from pipeline.export import load_quantizer
from pipeline.export.huggingface import huggingface_config, huggingface_state, write_huggingface
from pipeline.export.weights import write_codebook
from recipes.schema import Recipe, load_recipe
from tests.models.speech import make_batch, tiny_config, tiny_model

LAYOUTS = {
    "base": {"conv_norm": "group", "norm_order": "post"},
    "large": {"conv_norm": "layer", "norm_order": "pre"},
    "post-norm behind normed convolutions": {"conv_norm": "layer", "norm_order": "post"},
    "no projection": {"model_dim": 16, "heads": 2, "position_groups": 4},  # as wide as the features
}


def recipe_of(config, normalise=True) -> Recipe:
    """The tiny recipe around another model."""
    recipe = load_recipe("speech/wav2vec2_tiny")
    data = recipe.data.model_copy(update={"normalise": normalise})
    return recipe.model_copy(update={"model": config, "data": data})


def load_theirs(folder: Path) -> nn.Module:
    """transformers' model in evaluation mode; every weight of ours has met its place and the other way round."""
    theirs, loading = Wav2Vec2Model.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return theirs.eval()


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_computes_the_same_features(layout, tmp_path):
    """Bit for bit, computed in one process with 1, 2 or 4 threads: clips of one length, and padded ones with an
    attention mask."""
    model = tiny_model(**LAYOUTS[layout]).eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    theirs = load_theirs(tmp_path)
    batch = make_batch(model.config, [20_000, 20_000])
    expected = theirs(batch.waveforms).last_hidden_state
    assert torch.equal(model.extract(batch.waveforms, batch.lengths), expected)

    batch = make_batch(model.config)
    attention = torch.arange(batch.waveforms.shape[1]) < batch.lengths.unsqueeze(1)
    expected = theirs(batch.waveforms, attention_mask=attention.long()).last_hidden_state
    actual = model.extract(batch.waveforms, batch.lengths)
    for row, frames in enumerate(batch.frame_lengths.tolist()):
        assert torch.equal(actual[row, :frames], expected[row, :frames])
        unmasked = theirs(batch.waveforms).last_hidden_state[row, :frames]
        assert row == 0 or not torch.equal(unmasked, expected[row, :frames])  # else the mask would not matter


@torch.no_grad()
@pytest.mark.parametrize("layout", ["base", "large"])
def test_torchaudio_computes_the_same_features(layout, tmp_path):
    """A third implementation; it takes models of transformers, with or without a head."""
    model = tiny_model(**LAYOUTS[layout]).eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    for kind in (Wav2Vec2Model, Wav2Vec2ForCTC):
        theirs = import_huggingface_model(kind.from_pretrained(tmp_path, local_files_only=True)).eval()
        batch = make_batch(model.config)
        expected, frames = theirs.extract_features(batch.waveforms, batch.lengths)
        assert torch.equal(frames, batch.frame_lengths)
        last = expected[-1] if layout == "base" else theirs.encoder.transformer.layer_norm(expected[-1])
        actual = model.extract(batch.waveforms, batch.lengths)
        for row, count in enumerate(frames.tolist()):
            # Its attention sums in another order, so not bit for bit.
            torch.testing.assert_close(actual[row, :count], last[row, :count], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", [{"kind": "ksom", "codes": 8, "grid": [4, 2]}, {"kind": "ema", "groups": 2}])
def test_codes_come_from_their_features_and_the_codebook_file(options, tmp_path):
    """The quantizers that transformers does not know: what they see is its ``extract_features``."""
    model = tiny_model(options).eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    write_codebook(model, recipe_of(model.config), tmp_path)
    batch = make_batch(model.config, [20_000])
    features = load_theirs(tmp_path)(batch.waveforms).extract_features
    codes, _ = model.encode_codes(batch)
    assert codes.unique().numel() > 1
    assert torch.equal(load_quantizer(tmp_path).encode(features), codes)


def test_the_weights_are_renamed_and_not_computed_with(tmp_path):
    from safetensors.torch import load_file

    model = tiny_model().eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = huggingface_state(model.state_dict(), model.config)
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    ours = {name for name in model.state_dict() if not name.startswith(("quantizer", "context_proj", "target_proj"))}
    assert len(written) == len(ours)


def test_weights_without_a_place_are_named():
    model = tiny_model()
    state = model.state_dict() | {"encoder.layers.0.adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place for encoder\.layers\.0\.adapter\.weight"):
        huggingface_state(state, model.config)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_feature_extractor_prepares_clips_as_training_did(normalised, speech_source, tmp_path):
    model = tiny_model()
    write_huggingface(model, recipe_of(model.config, normalised), tmp_path)
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path, local_files_only=True)
    assert extractor.return_attention_mask is False  # the group norm sees padding
    clip = next(speech_source.rglob("*.flac"))
    waveform = decode_audio(clip.read_bytes())
    prepared = extractor(waveform, sampling_rate=16_000, return_tensors="np").input_values[0]
    expected = normalise(waveform) if normalised else waveform
    # The variance's epsilon is 1e-7 there and 1e-5 here, as in fairseq.
    assert prepared == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_config_holds_what_training_needs(tmp_path):
    model = tiny_model(masking={"negatives": 7, "length": 5, "probability": 0.5}, dropout=0.2, layer_drop=0.05)
    write_huggingface(model, recipe_of(model.config), tmp_path)
    config = Wav2Vec2Model.from_pretrained(tmp_path, local_files_only=True).config
    assert (config.hidden_dropout, config.layerdrop) == (0.2, 0.05)
    assert (config.mask_time_prob, config.mask_time_length, config.num_negatives) == (0.5, 5, 7)


def test_transformers_masks_as_many_frames_as_we_do():
    """With the written settings: a probability of .65 and spans of 10 mask 49 % of frames, in both."""
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    config = tiny_config(masking={"probability": 0.65, "length": 10})
    theirs = huggingface_config(recipe_of(config))
    frames, rows = 780, 400
    generator = np.random.default_rng(0)
    ours = np.mean([span_mask(frames, config.masking, generator).mean() for _ in range(rows)])
    np.random.seed(0)  # theirs draws from the global generator
    masks = _compute_mask_indices(
        (rows, frames), theirs.mask_time_prob, theirs.mask_time_length, min_masks=theirs.mask_time_min_masks
    )
    assert ours == pytest.approx(0.49, abs=0.01)
    assert masks.mean() == pytest.approx(ours, abs=0.01)


def test_odd_and_even_position_kernels_are_the_same_too(tmp_path):
    """Of an even kernel's output the last frame is dropped, of an odd one's none."""
    for kernel in (15, 16):
        model = tiny_model(position_kernel=kernel).eval()
        write_huggingface(model, recipe_of(tiny_config(position_kernel=kernel)), tmp_path / str(kernel))
        batch = make_batch(model.config, [9_000])
        with torch.no_grad():
            expected = load_theirs(tmp_path / str(kernel))(batch.waveforms).last_hidden_state
        assert torch.equal(model.extract(batch.waveforms, batch.lengths), expected)
