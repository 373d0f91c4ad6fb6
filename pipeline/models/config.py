"""The models a recipe may have: one configuration a kind.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.models.classifier_config import ClassifierConfig
from pipeline.models.image_config import AutoencoderConfig, SQVAEConfig, VQGANConfig, VQVAE2Config
from pipeline.models.speech_config import STANDARD_KERNELS, Wav2Vec2Config
from pipeline.models.vit_som_config import ViTSOMConfig

__all__ = [
    "ONLY",
    "AutoencoderConfig",
    "ClassifierConfig",
    "ModelConfig",
    "SQVAEConfig",
    "STANDARD_KERNELS",
    "VQGANConfig",
    "VQVAE2Config",
    "ViTSOMConfig",
    "Wav2Vec2Config",
]

ONLY = ""
"""Level of a model's only quantizer."""

ModelConfig = Annotated[
    Wav2Vec2Config | AutoencoderConfig | SQVAEConfig | VQVAE2Config | VQGANConfig | ViTSOMConfig | ClassifierConfig,
    Field(discriminator="kind"),
]
"""Each member has ``kind``; ``reads``, the kind of data set it is trained on; ``quantizer_input``, the size of the
vectors that go into its quantizer and the key that decides it; and with more than one quantizer ``levels``, their names
from coarse to fine."""
