"""From configurations to a model and to the collation that feeds it.

In: a recipe's parts. Out: an nn.Module whose ``quantizer`` is the recipe's, sized by the model where the recipe leaves
that open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.models.config import AutoencoderConfig, Wav2Vec2Config
from pipeline.quantizers import Quantizer, build_quantizer

if TYPE_CHECKING:
    from pipeline.data.collation import Collation
    from recipes.schema import Recipe


def build_model(model: Wav2Vec2Config | AutoencoderConfig, quantizer: Any) -> nn.Module:
    """The model of a recipe's ``model`` and ``quantizer`` sections, with random weights from torch's generator.

    Raises ValueError when ``quantizer.dim`` is given and is not what the model makes.
    """
    if isinstance(model, AutoencoderConfig):
        from pipeline.models.autoencoder import Autoencoder

        return Autoencoder(model, _quantizer_for(model.latent_dim, "model.latent_dim", quantizer))
    from pipeline.models.speech import Wav2Vec2Pretraining

    return Wav2Vec2Pretraining(model, _quantizer_for(model.feature_dim, "the last of model.conv_layers", quantizer))


def build_collation(recipe: Recipe) -> Collation:
    """How the recipe's samples become micro-batches: for speech the model decides frames, masks and negatives."""
    from pipeline.data import ImageCollation, SpeechCollation

    if isinstance(recipe.model, AutoencoderConfig):
        return ImageCollation(recipe.data, recipe.seed)
    return SpeechCollation(recipe.data, recipe.model.masking, recipe.model.conv_layers, recipe.seed)


def _quantizer_for(dim: int, source: str, config: Any) -> Quantizer:
    """The quantizer of latents of size ``dim``; a kind with an ``input_dim`` of its own may give vectors of another."""
    if "input_dim" in type(config).model_fields and config.input_dim is None:
        config = config.model_copy(update={"input_dim": dim})
    elif config.dim not in (None, dim):
        raise ValueError(f"quantizer.dim={config.dim} is not the latents' dimension {dim} ({source}): leave it out")
    if config.dim is None:
        config = config.model_copy(update={"dim": dim})
    return build_quantizer(type(config).model_validate(config.model_dump()))
