"""From configurations to models: sizes that fit, mistakes that are named, and nothing heavy at import."""

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from pipeline.data import ImageCollation, SpeechCollation
from pipeline.models import build_collation, build_model
from pipeline.models.config import STANDARD_KERNELS, AutoencoderConfig, Wav2Vec2Config
from pipeline.quantizers.ema import EMAConfig
from pipeline.quantizers.gumbel import GumbelConfig
from recipes.schema import load_recipe
from tests.models.speech import tiny_config


def test_the_model_supplies_the_quantizers_dimension():
    assert build_model(AutoencoderConfig(channels=8, latent_dim=24), EMAConfig(codes=8)).quantizer.dim == 24
    speech = build_model(tiny_config(), EMAConfig(codes=8))
    assert speech.quantizer.dim == speech.target_projection.in_features == 16


def test_a_quantizer_with_a_projection_of_its_own_may_have_another_dimension():
    model = build_model(tiny_config(), GumbelConfig(codes=8, groups=2, dim=20))
    assert (model.quantizer.input_dim, model.quantizer.dim) == (16, 20)
    assert model.target_projection.in_features == 20


@pytest.mark.parametrize(
    ("model", "source"), [(AutoencoderConfig(channels=8), "model.latent_dim"), (tiny_config(), "model.conv_layers")]
)
def test_another_dimension_is_refused(model, source):
    with pytest.raises(ValueError, match=rf"quantizer.dim=20 is not the latents' dimension.*{source}.*leave it out"):
        build_model(model, EMAConfig(codes=8, dim=20))


def test_groups_that_do_not_divide_the_models_dimension_are_refused():
    with pytest.raises(ValueError, match=r"dim=64 can't be split into groups=3"):
        build_model(AutoencoderConfig(channels=8), EMAConfig(codes=8, groups=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 5}, "heads=5 can't share model_dim=24"),
        ({"position_groups": 5}, "position_groups=5 can't share model_dim=24"),
        ({"conv_layers": [(16, 400, 320), (16, 80, 80)]}, "more than a second of audio"),
        ({"conv_layers": [(16, 10, 5), (16, 3, 0)]}, r"conv_layers\[1\]=\[16, 3, 0\] is no convolution: use"),
        ({"conv_layers": [(16, 0, 5)]}, r"conv_layers\[0\]=\[16, 0, 5\] is no convolution: use"),
        ({"conv_layers": [(0, 10, 5)]}, r"conv_layers\[0\]=\[0, 10, 5\] is no convolution: use"),
        ({"feature_gradient_scale": 0}, "greater than 0"),  # fairseq2 would refuse it, but only on the ranks
        ({"width": 3}, "Extra inputs are not permitted"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        tiny_config(**changes)


def test_the_seed_decides_the_weights():
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build_model(tiny_config(), EMAConfig(codes=8)).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    assert not all(torch.equal(tensor, models[2][name]) for name, tensor in models[0].items())


def test_the_defaults_are_wav2vec2_base():
    """95,044,608 parameters with the paper's product quantizer."""
    config = Wav2Vec2Config()
    assert [(kernel, stride) for _, kernel, stride in config.conv_layers] == list(STANDARD_KERNELS)
    with torch.device("meta"):
        model = build_model(config, GumbelConfig(codes=320, groups=2, dim=256))
    assert sum(parameter.numel() for parameter in model.parameters()) == 95_044_608


def test_collation_follows_the_recipes_model():
    assert isinstance(build_collation(load_recipe("image/autoencoder_tiny_ksom")), ImageCollation)
    speech = load_recipe("speech/wav2vec2_tiny")
    collation = build_collation(speech)
    assert isinstance(collation, SpeechCollation)
    assert collation.conv_layers == list(speech.model.conv_layers)
    assert collation.masking == speech.model.masking
    assert collation.frames(16_000) == 49


def test_the_configuration_loads_no_library():
    check = (
        "import sys, pipeline.models.config; print([m for m in ('torch', 'fairseq2', 'deepspeed') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
