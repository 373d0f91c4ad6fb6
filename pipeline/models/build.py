"""From configurations to a model and to the collation that feeds it.

In: a recipe's parts. Out: an nn.Module whose ``quantizer`` is the recipe's, sized by the model where the recipe leaves
that open.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.models.config import ONLY, ModelConfig, Wav2Vec2Config
from pipeline.quantizers import Quantizer, build_quantizer

if TYPE_CHECKING:
    from pipeline.data.collation import Collation
    from recipes.schema import Recipe


MODELS = {
    "wav2vec2": ("pipeline.models.speech", "Wav2Vec2Pretraining"),
    "autoencoder": ("pipeline.models.autoencoder", "Autoencoder"),
    "sqvae": ("pipeline.models.sqvae", "SQVAE"),
    "vit_som": ("pipeline.models.vit_som", "ViTSOM"),
    "vqvae2": ("pipeline.models.vqvae2", "VQVAE2"),
    "classifier": ("pipeline.models.classifier", "Classifier"),
    "vqgan": ("pipeline.models.vqgan", "VQGAN"),
}
"""Kind of model → its module, loaded when one is built, and its class, made of a configuration and a quantizer, or of
several by level where the configuration names ``levels``."""


def build_model(model: ModelConfig, quantizer: Any) -> nn.Module:
    """The model of a recipe's ``model`` and ``quantizer`` sections, with random weights from torch's generator.

    Raises ValueError when ``quantizer.dim`` is given and is not what the model makes.
    """
    module, name = MODELS[model.kind]
    levels: dict[str, Quantizer] = {
        level: _quantizer_for(*model.quantizer_input, quantizer) for level in getattr(model, "levels", [ONLY])
    }
    return getattr(import_module(module), name)(model, levels.get(ONLY, levels))


def build_collation(recipe: Recipe) -> Collation:
    """How the recipe's samples become micro-batches: for speech the model decides frames, masks and negatives."""
    from pipeline.data import ImageCollation, SpeechCollation

    if isinstance(recipe.model, Wav2Vec2Config):
        return SpeechCollation(recipe.data, recipe.model.masking, recipe.model.conv_layers, recipe.seed)
    return ImageCollation(recipe.data, recipe.seed)


def _quantizer_for(dim: int, source: str, config: Any) -> Quantizer:
    """The quantizer of latents of size ``dim``; a kind with an ``input_dim`` of its own may give vectors of another."""
    if "input_dim" in type(config).model_fields and config.input_dim is None:
        config = config.model_copy(update={"input_dim": dim})
    elif config.dim not in (None, dim):
        raise ValueError(f"quantizer.dim={config.dim} is not the latents' dimension {dim} ({source}): leave it out")
    if config.dim is None:
        config = config.model_copy(update={"dim": dim})
    return build_quantizer(type(config).model_validate(config.model_dump()))
