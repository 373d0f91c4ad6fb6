"""Configuration of the image autoencoders.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]


class ImageModelConfig(BaseModel):
    """What all kinds have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["speech", "image"]] = "image"

    latent_dim: int = Field(64, ge=1, description="dimension of a latent vector")

    @property
    def quantizer_input(self) -> tuple[int, str]:
        """Size of the vectors that go into the quantizer, and the key that decides it."""
        return self.latent_dim, "model.latent_dim"


class PixelOptions(BaseModel):
    """For nets whose images have about zero mean and unit variance: one number, or one of each colour."""

    pixel_mean: float | tuple[float, float, float] = Field(0.5, description="subtracted from pixels in [0, 1]")
    pixel_deviation: Positive | tuple[Positive, Positive, Positive] = Field(
        0.5, description="divides them; losses are on normalised pixels"
    )


class PerceptualConfig(BaseModel):
    """LPIPS as a loss, by files of yours: nothing is downloaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    network: Path = Field(description="torchvision's VGG16 or AlexNet")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of that file; another one is refused as training starts")
    heads: Path | None = Field(None, description="weights of the channels; none: those that come with torchmetrics")
    heads_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of the heads' file")
    weight: float = Field(1.0, gt=0, description="beside the mean error of a pixel value")


class DiscriminatorConfig(BaseModel):
    """A discriminator of patches that is trained beside the autoencoder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: float = Field(0.8, gt=0, description="of the autoencoder's loss, beside the mean error of a pixel value")
    start_step: int = Field(0, ge=0, description="optimiser steps before it begins to learn and to be heard")
    channels: int = Field(64, ge=1, description="width of the first layer; each further one has twice as much, up to 8")
    layers: int = Field(3, ge=1, le=6, description="halvings of the image")


class CriticOptions(BaseModel):
    """What judges reconstructions besides the error of their pixels; nothing if not asked for."""

    perceptual: PerceptualConfig | None = None
    discriminator: DiscriminatorConfig | None = None


class AutoencoderConfig(ImageModelConfig, PixelOptions, CriticOptions):
    """The VQ-VAE of the KSOM paper (Irie et al., arXiv 2302.07950, section 4): strided convolutions and residual
    blocks."""

    kind: Literal["autoencoder"] = "autoencoder"
    channels: int = Field(128, ge=2, description="width of encoder and decoder")
    residual_channels: int = Field(32, ge=1, description="inner width of a residual block")
    residual_layers: int = Field(2, ge=0, description="residual blocks in the encoder, and in the decoder")
    downsampling: int = Field(2, ge=1, le=6, description="halvings: an image of side s has s / 2^n latents a side")


class SQVAEConfig(ImageModelConfig, CriticOptions):
    """The net of SQ-VAE (Takida et al., arXiv 2205.07547), in which Huh et al. (arXiv 2305.08842) compare quantizers:
    with batch normalisation; its decoder ends in a sigmoid, so that losses are on pixels in [0, 1]."""

    kind: Literal["sqvae"] = "sqvae"
    latent_dim: int = Field(64, ge=2, description="dimension of a latent vector, and width of encoder and decoder")
    residual_layers: int = Field(2, ge=0, description="residual blocks in the encoder, and in the decoder")
    downsampling: int = Field(2, ge=1, le=6, description="halvings: an image of side s has s / 2^n latents a side")
    norm_momentum: float = Field(
        0.1, gt=0, le=1, description="share that a step's statistics get in those that evaluation normalises by"
    )


class VQVAE2Config(ImageModelConfig, PixelOptions, CriticOptions):
    """VQ-VAE-2 (Razavi et al., arXiv 1906.00446) in the sizes of the KSOM paper: codes at an eighth of an image's side
    and at a quarter of it, each with a quantizer of the recipe's."""

    levels: ClassVar[tuple[str, ...]] = ("top", "bottom")

    kind: Literal["vqvae2"] = "vqvae2"
    channels: int = Field(128, ge=2, description="width of encoders and decoders")
    residual_channels: int = Field(32, ge=1, description="inner width of a residual block")
    residual_layers: int = Field(2, ge=0, description="residual blocks in each encoder and decoder")


class VQGANConfig(ImageModelConfig, PixelOptions, CriticOptions):
    """The net of VQGAN (Esser et al., arXiv 2012.09841), of LDM's and of LlamaGen's tokenizers."""

    kind: Literal["vqgan"] = "vqgan"
    channels: int = Field(128, ge=32, multiple_of=32, description="width at the images' size; norms have 32 groups")
    multipliers: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 1, 2, 2, 4), min_length=2, description="width of each level over channels; each halves the size once more"
    )
    residual_layers: int = Field(2, ge=1, description="residual blocks of a level; the decoder has one more")
    attention_levels: int = Field(1, ge=0, description="levels with attention after each block, from the smallest on")
    latent_dim: int = Field(256, ge=1, description="dimension of a latent vector")
    net_dim: int = Field(
        256, ge=1, description="channels of encoder and decoder beside the convolutions of one pixel that make latents"
    )
    absolute_weight: float = Field(1.0, ge=0, description="of the absolute error of normalised pixels")
    squared_weight: float = Field(0.0, ge=0, description="of their squared error")

    @model_validator(mode="after")
    def _something_is_reconstructed(self) -> VQGANConfig:
        if not self.absolute_weight and not self.squared_weight:
            raise ValueError("absolute_weight=0 and squared_weight=0 leave nothing to learn from: give one of them")
        return self
