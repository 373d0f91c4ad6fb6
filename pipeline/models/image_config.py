"""Configuration of the image autoencoders.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class AutoencoderConfig(BaseModel):
    """The VQ-VAE of the KSOM paper (Irie et al., arXiv 2302.07950, section 4): strided convolutions and residual
    blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["speech", "image"]] = "image"

    kind: Literal["autoencoder"] = "autoencoder"
    channels: int = Field(128, ge=2, description="width of encoder and decoder")
    residual_channels: int = Field(32, ge=1, description="inner width of a residual block")
    residual_layers: int = Field(2, ge=0, description="residual blocks in the encoder, and in the decoder")
    latent_dim: int = Field(64, ge=1, description="dimension of a latent vector")
    downsampling: int = Field(2, ge=1, le=6, description="halvings: an image of side s has s / 2^n latents a side")
    pixel_mean: float = Field(0.5, description="subtracted from pixels in [0, 1]")
    pixel_deviation: float = Field(0.5, gt=0, description="divides them; losses are on normalised pixels")

    @property
    def quantizer_input(self) -> tuple[int, str]:
        """Size of the vectors that go into the quantizer, and the key that decides it."""
        return self.latent_dim, "model.latent_dim"
