"""Our encoder in transformers: the same weights under other names, and the same features."""

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2Model

from pipeline.data.audio import decode_audio, normalise
from pipeline.export.huggingface import huggingface_state, write_huggingface
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


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transformers_computes_the_same_features(layout, tmp_path):
    """Tolerance 1e-5: measured 0 in a quiet process, but kernels split sums differently by thread count and shape."""
    model = tiny_model(**LAYOUTS[layout]).eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    theirs, loading = Wav2Vec2Model.from_pretrained(tmp_path, local_files_only=True, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    batch = make_batch(model.config, [20_000, 20_000])
    with torch.no_grad():
        expected = theirs.eval()(batch.waveforms).last_hidden_state
    torch.testing.assert_close(model.extract(batch.waveforms, batch.lengths), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["large", "post-norm behind normed convolutions"])
def test_padded_clips_too(layout, tmp_path):
    model = tiny_model(**LAYOUTS[layout]).eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    theirs = Wav2Vec2Model.from_pretrained(tmp_path, local_files_only=True).eval()
    batch = make_batch(model.config)
    attention = torch.arange(batch.waveforms.shape[1]) < batch.lengths.unsqueeze(1)
    with torch.no_grad():
        expected = theirs(batch.waveforms, attention_mask=attention.long()).last_hidden_state
    actual = model.extract(batch.waveforms, batch.lengths)
    for row, frames in enumerate(batch.frame_lengths.tolist()):
        torch.testing.assert_close(actual[row, :frames], expected[row, :frames], rtol=0, atol=1e-5)


def test_the_weights_are_renamed_and_not_computed_with(tmp_path):
    from safetensors.torch import load_file

    model = tiny_model().eval()
    write_huggingface(model, recipe_of(model.config), tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    expected = huggingface_state(model.state_dict(), model.config.model_dim)
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in written.items())
    ours = {name for name in model.state_dict() if not name.startswith(("quantizer", "context_proj", "target_proj"))}
    assert len(written) == len(ours)


def test_weights_without_a_place_are_named():
    state = tiny_model().state_dict() | {"encoder.layers.0.adapter.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no place for encoder\.layers\.0\.adapter\.weight"):
        huggingface_state(state, 24)


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


def test_config_holds_what_fine_tuning_needs(tmp_path):
    model = tiny_model(masking={"negatives": 7, "length": 5, "probability": 0.5}, dropout=0.2, layer_drop=0.05)
    write_huggingface(model, recipe_of(model.config), tmp_path)
    config = Wav2Vec2Model.from_pretrained(tmp_path, local_files_only=True).config
    assert (config.hidden_dropout, config.layerdrop) == (0.2, 0.05)
    assert (config.mask_time_prob, config.mask_time_length, config.num_negatives) == (0.1, 5, 7)


def test_odd_and_even_position_kernels_are_the_same_too(tmp_path):
    """Of an even kernel's output the last frame is dropped, of an odd one's none."""
    for kernel in (15, 16):
        model = tiny_model(position_kernel=kernel).eval()
        write_huggingface(model, recipe_of(tiny_config(position_kernel=kernel)), tmp_path / str(kernel))
        theirs = Wav2Vec2Model.from_pretrained(tmp_path / str(kernel), local_files_only=True).eval()
        batch = make_batch(model.config, [9_000])
        with torch.no_grad():
            expected = theirs(batch.waveforms).last_hidden_state
        torch.testing.assert_close(model.extract(batch.waveforms, batch.lengths), expected, rtol=0, atol=1e-5)
