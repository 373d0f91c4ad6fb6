"""Convolutional discrete autoencoders: encoder → quantizer → decoder.

What every net of that form does, and the net of van den Oord et al. (arXiv 1711.00937) with the sizes of Irie et al.
(arXiv 2302.07950). In: images in [0, 1]. Out: reconstructions, codes on the latent grid, and the losses of a
micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.data.collation import ImageBatch
from pipeline.models.base import StepOutput, quantizer_losses, quantizer_metrics
from pipeline.models.config import AutoencoderConfig
from pipeline.quantizers import Quantizer

Statistic = float | tuple[float, float, float]


class DiscreteAutoencoder(nn.Module):
    """Images to codes and back by any ``encoder`` and ``decoder``; loss: squared error summed over pixel values, plus
    the quantizer's.

    The encoder makes ``(batch, dim, h, w)`` of normalised images ``(batch, 3, height, width)``, ``shrinkage`` times
    smaller, and the decoder images of those.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module,
        shrinkage: int,
        pixel_mean: Statistic = 0.0,
        pixel_deviation: Statistic = 1.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder
        self.shrinkage = shrinkage
        self.pixel_mean, self.pixel_deviation = pixel_mean, pixel_deviation

    def forward(self, batch: ImageBatch) -> StepOutput:
        """Losses and metrics of one micro-batch."""
        images = self._normalise(batch.pixels)
        # Only what enters the net takes its precision: targets in bf16 would be off by up to half a grey level.
        output = self.quantizer(self._encode(images.to(next(self.decoder.parameters()).dtype)))
        decoded = self._decode(output.vectors).float()
        return StepOutput(
            losses=self.reconstruction_losses(decoded, images) | quantizer_losses(output, batch.targets),
            metrics=self._metrics(decoded, images, batch.targets) | quantizer_metrics(output),
            quantizer=output,
        )

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Losses of normalised images ``(batch, 3, height, width)``, by name: sums over pixel values."""
        return {"reconstruction": (decoded - images).square().sum()}

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
        height, width = pixels.shape[-2:]
        if height % self.shrinkage or width % self.shrinkage:
            raise ValueError(
                f"images of {height}×{width} can't be halved {self.shrinkage.bit_length() - 1} times: "
                f"use data.image_size a multiple of {self.shrinkage}, or a model that shrinks images less"
            )
        return (pixels - of_colours(self.pixel_mean, pixels)) / of_colours(self.pixel_deviation, pixels)

    def _metrics(self, decoded: Tensor, images: Tensor, targets: int) -> dict[str, tuple[Tensor, Tensor]]:
        """``mse`` of pixels in [0, 1]."""
        error = decoded.detach() - images
        squared = error.mul_(of_colours(self.pixel_deviation, images)).square_().sum()  # the step's memory peaks here
        return {"mse": (squared, torch.tensor(float(targets), device=squared.device))}

    def _encode(self, images: Tensor) -> Tensor:
        """→ latents with channels last, ``(batch, h, w, dim)``."""
        return self.encoder(images).permute(0, 2, 3, 1)

    def _decode(self, vectors: Tensor) -> Tensor:
        """Vectors with channels last → normalised images."""
        return self.decoder(vectors.permute(0, 3, 1, 2))

    def _to_pixels(self, images: Tensor) -> Tensor:
        mean, deviation = of_colours(self.pixel_mean, images), of_colours(self.pixel_deviation, images)
        return (images * deviation + mean).clamp(0, 1)


class Autoencoder(DiscreteAutoencoder):
    """The VQ-VAE."""

    def __init__(self, config: AutoencoderConfig, quantizer: Quantizer) -> None:
        super().__init__(
            _encoder(config),
            quantizer,
            _decoder(config),
            shrinkage=2**config.downsampling,
            pixel_mean=config.pixel_mean,
            pixel_deviation=config.pixel_deviation,
        )
        self.config = config

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that may be computed twice, and compiled."""
        return [block for block in self.modules() if isinstance(block, ResidualBlock)]


class ResidualBlock(nn.Module):
    """``x + conv1(relu(conv3(relu(x))))``."""

    def __init__(self, channels: int, inner: int, *, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, inner, 3, padding=1, bias=bias),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=bias),
        )

    def forward(self, features: Tensor) -> Tensor:  # (batch, channels, height, width)
        return features + self.layers(features)


def of_colours(statistic: Statistic, images: Tensor) -> float | Tensor:
    """One number, or those of each colour as ``(3, 1, 1)``."""
    return images.new_tensor(statistic).view(3, 1, 1) if isinstance(statistic, tuple) else statistic


def stem_widths(channels: int, downsampling: int) -> list[int]:
    """Channels after each halving: half the width after the first of several, the full width after the others."""
    first = [channels // 2] if downsampling > 1 else []
    return first + [channels] * (downsampling - len(first))


def _encoder(config: AutoencoderConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    width = 3
    for channels in stem_widths(config.channels, config.downsampling):
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
    for channels in [*stem_widths(config.channels, config.downsampling)[:-1][::-1], 3]:
        layers += [nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers[:-1])  # no nonlinearity after the last: pixels may have any value


def _residual_stack(config: AutoencoderConfig) -> list[nn.Module]:
    blocks = [ResidualBlock(config.channels, config.residual_channels) for _ in range(config.residual_layers)]
    return [*blocks, nn.ReLU()]
