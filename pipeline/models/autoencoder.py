"""A convolutional discrete autoencoder: encoder → quantizer → decoder.

The net of van den Oord et al. (arXiv 1711.00937) with the sizes of Irie et al. (arXiv 2302.07950). In: images in [0,
1]. Out: reconstructions, codes on the latent grid, and the losses of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.data.collation import ImageBatch
from pipeline.models.base import StepOutput, quantizer_losses, quantizer_metrics
from pipeline.models.config import AutoencoderConfig
from pipeline.quantizers import Quantizer


class ResidualBlock(nn.Module):
    """``x + conv1(relu(conv3(relu(x))))``."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, features: Tensor) -> Tensor:  # (batch, channels, height, width)
        return features + self.layers(features)


class Autoencoder(nn.Module):
    """Images to codes and back; loss: squared error summed over pixel values, plus the quantizer's."""

    def __init__(self, config: AutoencoderConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.quantizer = quantizer
        self.decoder = _decoder(config)

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that may be computed twice, and compiled."""
        return [block for block in [*self.encoder, *self.decoder] if isinstance(block, ResidualBlock)]

    def forward(self, batch: ImageBatch) -> StepOutput:
        """Losses and metrics of one micro-batch."""
        images = self._normalise(batch.pixels)
        # Only what enters the net takes its precision: targets in bf16 would be off by up to half a grey level.
        output = self.quantizer(self._encode(images.to(next(self.decoder.parameters()).dtype)))
        decoded = self._decode(output.vectors)
        squared = (decoded.float() - images).square().sum()
        values = torch.tensor(float(batch.targets), device=squared.device)
        return StepOutput(
            losses={"reconstruction": squared} | quantizer_losses(output, batch.targets),
            metrics={"mse": (squared.detach() * self.config.pixel_deviation**2, values)} | quantizer_metrics(output),
            quantizer=output,
        )

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``pixels (batch, 3, height, width)`` in [0, 1] → reconstruction of the same shape, clipped to [0, 1], and
        codes ``(batch, h, w, groups)``.
        """
        output = self.quantizer(self._encode(self._normalise(pixels)))
        return self._to_pixels(self._decode(output.vectors)), output.codes

    @torch.no_grad()
    def encode_codes(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Codes ``(batch, h, w, groups)`` int64, and how many tokens each image has, ``(batch,)``."""
        codes = self.quantizer.encode(self._encode(self._normalise(batch.pixels)))
        tokens = codes.shape[1] * codes.shape[2]
        return codes, torch.full((codes.shape[0],), tokens, dtype=torch.int64)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes ``(batch, h, w, groups)`` → pixels ``(batch, 3, height, width)`` in [0, 1]."""
        return self._to_pixels(self._decode(self.quantizer.decode(codes)))

    def _normalise(self, pixels: Tensor) -> Tensor:
        side = 2**self.config.downsampling
        if pixels.shape[-1] % side or pixels.shape[-2] % side:
            raise ValueError(
                f"images of {pixels.shape[-2]}×{pixels.shape[-1]} can't be halved {self.config.downsampling} times: "
                f"use data.image_size a multiple of {side}, or a smaller model.downsampling"
            )
        return (pixels - self.config.pixel_mean) / self.config.pixel_deviation

    def _encode(self, images: Tensor) -> Tensor:
        """→ latents with channels last, ``(batch, h, w, latent_dim)``."""
        return self.encoder(images).permute(0, 2, 3, 1)

    def _decode(self, vectors: Tensor) -> Tensor:
        """Vectors with channels last → normalised images."""
        return self.decoder(vectors.permute(0, 3, 1, 2))

    def _to_pixels(self, images: Tensor) -> Tensor:
        return (images * self.config.pixel_deviation + self.config.pixel_mean).clamp(0, 1)


def _widths(config: AutoencoderConfig) -> list[int]:
    """Channels after each halving: half the width after the first of several, the full width after the others."""
    first = [config.channels // 2] if config.downsampling > 1 else []
    return first + [config.channels] * (config.downsampling - len(first))


def _encoder(config: AutoencoderConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for channels in _widths(config):
        layers += [nn.Conv2d(width, channels, 4, stride=2, padding=1), nn.ReLU()]
        width = channels
    layers.append(nn.Conv2d(width, config.channels, 3, padding=1))
    layers += _residual_stack(config)
    layers.append(nn.Conv2d(config.channels, config.latent_dim, 1))
    return nn.Sequential(*layers)


def _decoder(config: AutoencoderConfig) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(config.latent_dim, config.channels, 3, padding=1)]
    layers += _residual_stack(config)
    width = config.channels
    for channels in [*_widths(config)[:-1][::-1], 3]:
        layers += [nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers[:-1])  # no nonlinearity after the last: pixels may have any value


def _residual_stack(config: AutoencoderConfig) -> list[nn.Module]:
    blocks = [ResidualBlock(config.channels, config.residual_channels) for _ in range(config.residual_layers)]
    return [*blocks, nn.ReLU()]
