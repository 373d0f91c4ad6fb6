"""The speech recipes: the published sizes and settings, and a variant for each quantizer by one override."""

import pytest
import soundfile  # noqa: F401 - before fairseq2
import torch
from fairseq2.models.wav2vec2 import Wav2Vec2Config, Wav2Vec2Factory, register_wav2vec2_configs
from fairseq2.runtime.dependency import DependencyContainer

from pipeline.models import build_model
from pipeline.models.speech import fairseq2_config
from recipes.schema import load_recipe

SIZES = {"tiny": 385_632, "small": 32_127_232, "base": 95_044_608, "large": 317_390_592}
VARIANTS = ("gumbel", "knn_simplex", "ema", "ksom", "affine")


def on_meta(recipe):
    with torch.device("meta"):
        return build_model(recipe.model, recipe.quantizer)


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    model = on_meta(load_recipe(f"speech/wav2vec2_{size}"))
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", VARIANTS)
def test_one_override_is_another_quantizer(size, kind):
    """Of the recipe's codes, whatever the recipe's own kind; what is encoded and masked stays."""
    name = f"speech/wav2vec2_{size}"
    recipe, own = load_recipe(name, [f"quantizer.kind={kind}"]), load_recipe(name)
    assert recipe.quantizer.kind == kind
    assert (recipe.model, recipe.batch, recipe.training) == (own.model, own.batch, own.training)
    if size != "tiny":
        assert (recipe.quantizer.codes, recipe.quantizer.groups) == (320, 2)
    assert recipe.codebooks.initialise == ("kmeans" if kind in ("ema", "ksom", "affine") else "none")
    assert on_meta(recipe).quantizer.groups == recipe.quantizer.groups


@pytest.mark.parametrize(("size", "architecture"), [("base", "base"), ("large", "large_lv60k")])
def test_published_models_are_those_of_fairseq2(size, architecture):
    container = DependencyContainer()
    register_wav2vec2_configs(container)
    theirs = container.resolve(Wav2Vec2Config, key=architecture)
    recipe = load_recipe(f"speech/wav2vec2_{size}")
    ours = fairseq2_config(recipe.model).encoder_config
    expected = theirs.encoder_config
    # The dropout of features and the scale of their gradient are settings of fairseq2's recipes.
    expected.first_pass_dropout_p, expected.feature_grad_scale = ours.first_pass_dropout_p, ours.feature_grad_scale
    expected.attn_dropout_p = ours.attn_dropout_p
    assert ours == expected
    assert recipe.model.final_dim == theirs.final_dim
    quantizer = recipe.quantizer
    assert (quantizer.groups, quantizer.codes, quantizer.dim) == (2, theirs.num_codebook_entries, theirs.quantized_dim)
    assert quantizer.temperature == theirs.codebook_sampling_temperature
    with torch.device("meta"):
        model = Wav2Vec2Factory(theirs).create_model()
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[size]


def test_published_training():
    """fairseq's wav2vec2_base_librispeech.yaml and wav2vec2_large_librivox.yaml."""
    base, large = load_recipe("speech/wav2vec2_base"), load_recipe("speech/wav2vec2_large")
    for recipe, crop, micro_batches, padded in [(base, 250_000, 64, 1_400_000), (large, 320_000, 128, 1_200_000)]:
        assert (recipe.data.min_samples, recipe.data.max_samples) == (32_000, crop)
        assert (recipe.batch.micro_batches, recipe.batch.seconds * 16_000) == (micro_batches, padded)
        assert (recipe.optimizer.betas, recipe.optimizer.epsilon, recipe.optimizer.weight_decay) == (
            (0.9, 0.98),
            1e-6,
            0.01,
        )
        assert (recipe.schedule.kind, recipe.schedule.warmup_steps) == ("polynomial", 32_000)
        assert (recipe.schedule.power, recipe.schedule.final_factor) == (1.0, 0.0)
        assert recipe.engine.gradient_clipping == 0
        masking = recipe.model.masking
        assert (masking.probability, masking.length, masking.minimum_spans, masking.negatives) == (0.65, 10, 2, 100)
        assert recipe.quantizer.diversity_weight == 0.1
    assert (base.optimizer.learning_rate, large.optimizer.learning_rate) == (5e-4, 3e-4)
    assert (base.training.steps, large.training.steps) == (400_000, 1_000_000)
    assert (base.model.feature_penalty, large.model.feature_penalty) == (10.0, 0.0)
    assert (base.model.feature_gradient_scale, large.model.feature_gradient_scale) == (0.1, 1.0)
    assert (base.data.normalise, large.data.normalise) == (False, True)
    dropouts = ("dropout", "attention_dropout", "ffn_dropout", "feature_dropout", "layer_drop")
    assert [getattr(base.model, name) for name in dropouts] == [0.1, 0.1, 0.0, 0.1, 0.05]
    assert [getattr(large.model, name) for name in dropouts] == [0.0] * 5
