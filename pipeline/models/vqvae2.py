"""VQ-VAE-2 (Razavi et al., arXiv 1906.00446): two levels of codes, in the sizes of the KSOM paper.

The bottom encoder's features, a quarter of the image's side, go on to the top's, an eighth. The top is quantized first;
what a small decoder makes of it is joined to the bottom's features before these are quantized. The image comes from
both. In: images in [0, 1]. Out: as of every autoencoder, with codes of the levels "top" and "bottom".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.autoencoder import ImageAutoencoder, ResidualBlock, channels_first, channels_last
from pipeline.models.config import VQVAE2Config
from pipeline.quantizers import Quantizer, QuantizerOutput


class VQVAE2(ImageAutoencoder):
    """The net of github.com/rosinality/vq-vae-2-pytorch, which the KSOM paper's code uses too."""

    block_types = (ResidualBlock,)

    def __init__(self, config: VQVAE2Config, quantizers: dict[str, Quantizer]) -> None:
        super().__init__(8, pixel_mean=config.pixel_mean, pixel_deviation=config.pixel_deviation, critics=config)
        self.config = config
        width, dim = config.channels, config.latent_dim
        self.encoder_bottom = nn.Sequential(
            nn.Conv2d(3, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            *_residual_stack(config),
        )
        self.encoder_top = nn.Sequential(
            nn.Conv2d(width, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, padding=1),
            *_residual_stack(config),
        )
        self.latents_top = nn.Conv2d(width, dim, 1)
        self.decoder_top = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1),
            *_residual_stack(config),
            nn.ConvTranspose2d(width, dim, 4, stride=2, padding=1),
        )
        self.latents_bottom = nn.Conv2d(dim + width, dim, 1)
        self.quantizers = nn.ModuleDict({level: quantizers[level] for level in config.levels})
        self.upsample_top = nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1)
        self.decoder = nn.Sequential(
            nn.Conv2d(2 * dim, width, 3, padding=1),
            *_residual_stack(config),
            nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, 3, 4, stride=2, padding=1),
        )

    def quantize(self, images: Tensor) -> dict[str, QuantizerOutput]:
        return self._through_levels(images, lambda quantizer, latents: quantizer(latents), lambda _, out: out.vectors)

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        def vectors(quantizer: Any, codes: Tensor) -> Tensor:
            return quantizer.decode(codes).to(images.dtype)

        return self._through_levels(images, lambda quantizer, latents: quantizer.encode(latents), vectors)

    def decode(self, vectors: dict[str, Tensor]) -> Tensor:
        top = self.upsample_top(channels_first(vectors["top"]))
        return self.decoder(torch.cat([top, channels_first(vectors["bottom"])], dim=1))

    def _through_levels(
        self, images: Tensor, look: Callable[[Any, Tensor], Any], vectors: Callable[[Any, Any], Tensor]
    ) -> dict[str, Any]:
        """What ``look`` finds for each level's latents; ``vectors`` of what it found at the top go into the bottom."""
        features = self.encoder_bottom(images)
        top = look(self.quantizers["top"], channels_last(self.latents_top(self.encoder_top(features))))
        coarse = self.decoder_top(channels_first(vectors(self.quantizers["top"], top)))
        latents = channels_last(self.latents_bottom(torch.cat([coarse, features], dim=1)))
        return {"top": top, "bottom": look(self.quantizers["bottom"], latents)}


def _residual_stack(config: VQVAE2Config) -> list[nn.Module]:
    blocks = [
        ResidualBlock(config.channels, config.residual_channels, bias=True) for _ in range(config.residual_layers)
    ]
    return [*blocks, nn.ReLU()]
