"""The net of SQ-VAE (Takida et al., arXiv 2205.07547) with any quantizer.

Huh et al. (arXiv 2305.08842) take "the SQ-VAE backbone" for their autoencoders; layer by layer this is the net that
SQ-VAE's code has for images of 32 pixels, of any depth, without the biases that a norm takes out again: their gradient
is rounding error, which Adam would blow up to steps of its full size. In: images in [0, 1]. Out: as of every
autoencoder.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.autoencoder import DiscreteAutoencoder, stem_widths
from pipeline.models.batch_norm import BatchNorm
from pipeline.models.config import SQVAEConfig
from pipeline.quantizers import Quantizer


class NormalisedBlock(nn.Module):
    """``x + norm(conv1(relu(norm(conv3(relu(x))))))``."""

    def __init__(self, channels: int, momentum: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            BatchNorm(channels, momentum),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1, bias=False),
            BatchNorm(channels, momentum),
        )

    def forward(self, features: Tensor) -> Tensor:  # (batch, channels, height, width)
        return features + self.layers(features)


class SQVAE(DiscreteAutoencoder):
    """Strided convolutions and residual blocks, all with batch normalisation, and a sigmoid at the end."""

    block_types = (NormalisedBlock,)

    def __init__(self, config: SQVAEConfig, quantizer: Quantizer) -> None:
        super().__init__(
            _encoder(config), quantizer, _decoder(config), shrinkage=2**config.downsampling, critics=config
        )
        self.config = config


def _encoder(config: SQVAEConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for channels in stem_widths(config.latent_dim, config.downsampling):
        layers += _with_norm(nn.Conv2d(width, channels, 4, stride=2, padding=1, bias=False), config)
        width = channels
    layers += _with_norm(nn.Conv2d(width, width, 3, padding=1, bias=False), config)
    return nn.Sequential(*layers, *_blocks(config))


def _decoder(config: SQVAEConfig) -> nn.Sequential:
    width = config.latent_dim
    layers = _blocks(config) + _with_norm(nn.ConvTranspose2d(width, width, 3, padding=1, bias=False), config)
    for channels in stem_widths(config.latent_dim, config.downsampling)[:-1][::-1]:
        layers += _with_norm(nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1, bias=False), config)
        width = channels
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1), nn.Sigmoid())


def _with_norm(convolution: nn.Conv2d | nn.ConvTranspose2d, config: SQVAEConfig) -> list[nn.Module]:
    return [convolution, BatchNorm(convolution.out_channels, config.norm_momentum), nn.ReLU()]


def _blocks(config: SQVAEConfig) -> list[nn.Module]:
    return [NormalisedBlock(config.latent_dim, config.norm_momentum) for _ in range(config.residual_layers)]
