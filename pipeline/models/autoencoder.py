"""Convolutional discrete autoencoders: encoder → quantizer → decoder.

What every net of that form does, and the net of van den Oord et al. (arXiv 1711.00937) with the sizes of Irie et al.
(arXiv 2302.07950). In: images in [0, 1]. Out: reconstructions, codes on the latent grid, and the losses of a
micro-batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.data.collation import ImageBatch
from pipeline.models.base import StepOutput, quantizer_losses, quantizer_metrics, quantizers_of
from pipeline.models.config import ONLY, AutoencoderConfig
from pipeline.models.critics import Critics
from pipeline.models.image_config import CriticOptions
from pipeline.quantizers import Quantizer, QuantizerOutput

Statistic = float | tuple[float, float, float]
Codes = Tensor | dict[str, Tensor]
"""``(batch, h, w, groups)`` int64; of several levels by level, coarse to fine."""


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


class ImageAutoencoder(nn.Module):
    """Images to codes and back; loss: squared error summed over pixel values, plus the quantizers'.

    A kind has its quantizers as :func:`pipeline.models.base.quantizers_of` finds them, and implements
    :meth:`quantize`, :meth:`encode` and :meth:`decode`. What has an entry a level there is given and taken by the other
    methods as it is where there is only one.
    """

    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(
        self,
        shrinkage: int,
        pixel_mean: Statistic = 0.0,
        pixel_deviation: Statistic = 1.0,
        critics: CriticOptions | None = None,
    ) -> None:
        """``shrinkage``: how many times more pixels than latents a side has; ``critics``: what judges reconstructions
        in training besides :meth:`reconstruction_losses`."""
        super().__init__()
        self.shrinkage = shrinkage
        self.pixel_mean, self.pixel_deviation = pixel_mean, pixel_deviation
        self.critics = Critics(critics or CriticOptions())

    # -- what a kind implements ------------------------------------------------------------------------------------

    def quantize(self, images: Tensor) -> dict[str, QuantizerOutput]:
        """Normalised images ``(batch, 3, height, width)`` → what each level's quantizer gives for ``(batch, h, w)``
        tokens, coarse to fine."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        """Codes ``(batch, h, w, groups)`` of each level, coarse to fine, without touching any state."""
        raise NotImplementedError

    def decode(self, vectors: dict[str, Tensor]) -> Tensor:
        """Vectors ``(batch, h, w, dim)`` of each level → normalised images."""
        raise NotImplementedError

    # -- what everyone calls ---------------------------------------------------------------------------------------

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that may be computed twice, and compiled."""
        return [block for block in self.modules() if isinstance(block, self.block_types)]

    def forward(self, batch: ImageBatch) -> StepOutput:
        """Losses and metrics of one micro-batch."""
        images = self._normalise(batch.pixels)
        # Only what enters the net takes its precision: targets in bf16 would be off by up to half a grey level.
        outputs = self.quantize(images.to(next(self.parameters()).dtype))
        decoded = self.decode({level: output.vectors for level, output in outputs.items()}).float()
        losses = self.reconstruction_losses(decoded, images)
        if self.training:
            judged = self.critics(images, decoded, self._pixels_of, self._steps_done)
            losses |= {name: loss * batch.targets for name, loss in judged.items()}
        metrics = self._metrics(decoded, images, batch.targets)
        for level, output in outputs.items():
            losses |= quantizer_losses(output, batch.targets, level)
            metrics |= quantizer_metrics(output, level)
        *coarser, finest = outputs.values()
        return StepOutput(losses, metrics, finest, tuple(coarser))

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Losses of normalised images ``(batch, 3, height, width)``, by name: sums over pixel values."""
        return {"reconstruction": (decoded - images).square().sum()}

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Codes]:
        """``pixels (batch, 3, height, width)`` in [0, 1] → reconstruction of the same shape, clipped to [0, 1], and
        codes ``(batch, h, w, groups)``.
        """
        outputs = self.quantize(self._normalise(pixels))
        decoded = self.decode({level: output.vectors for level, output in outputs.items()})
        return self._to_pixels(decoded), _alone({level: output.codes for level, output in outputs.items()})

    @torch.no_grad()
    def encode_codes(self, batch: ImageBatch) -> tuple[Codes, Tensor]:
        """Codes ``(batch, h, w, groups)`` int64, and how many tokens each image has, ``(batch,)``."""
        codes = self.encode(self._normalise(batch.pixels))
        tokens = sum(of_level.shape[1] * of_level.shape[2] for of_level in codes.values())
        return _alone(codes), torch.full((len(batch.pixels),), tokens, dtype=torch.int64)

    @torch.no_grad()
    def decode_codes(self, codes: Codes) -> Tensor:
        """Codes ``(batch, h, w, groups)`` → pixels ``(batch, 3, height, width)`` in [0, 1]."""
        levels = codes if isinstance(codes, dict) else {ONLY: codes}
        vectors = {level: quantizer.decode(levels[level]) for level, quantizer in quantizers_of(self).items()}
        return self._to_pixels(self.decode(vectors))

    def _normalise(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        if height % self.shrinkage or width % self.shrinkage:
            raise ValueError(
                f"images of {height}×{width} can't be halved {self.shrinkage.bit_length() - 1} times: "
                f"use data.image_size a multiple of {self.shrinkage}, or a model that shrinks images less"
            )
        normalised = (pixels - of_colours(self.pixel_mean, pixels)) / of_colours(self.pixel_deviation, pixels)
        # The order in which quantizers take latents, and in which convolutions are fastest.
        return normalised.contiguous(memory_format=torch.channels_last)

    def _metrics(self, decoded: Tensor, images: Tensor, targets: int) -> dict[str, tuple[Tensor, Tensor]]:
        """``mse`` of pixels in [0, 1]."""
        error = decoded.detach() - images
        squared = error.mul_(of_colours(self.pixel_deviation, images)).square_().sum()  # the step's memory peaks here
        return {"mse": (squared, torch.tensor(float(targets), device=squared.device))}

    def _steps_done(self) -> int:
        return int(next(iter(quantizers_of(self).values())).updates)

    def _pixels_of(self, images: Tensor) -> Tensor:
        mean, deviation = of_colours(self.pixel_mean, images), of_colours(self.pixel_deviation, images)
        return images * deviation + mean

    def _to_pixels(self, images: Tensor) -> Tensor:
        return self._pixels_of(images).clamp(0, 1)


class DiscreteAutoencoder(ImageAutoencoder):
    """One quantizer between any ``encoder``, images to ``(batch, dim, h, w)``, and ``decoder``, the way back."""

    def __init__(
        self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module, shrinkage: int, **options: Any
    ) -> None:
        super().__init__(shrinkage, **options)
        self.encoder = encoder
        self.quantizer = quantizer
        self.decoder = decoder

    def quantize(self, images: Tensor) -> dict[str, QuantizerOutput]:
        return {ONLY: self.quantizer(channels_last(self.encoder(images)))}

    def encode(self, images: Tensor) -> dict[str, Tensor]:
        return {ONLY: self.quantizer.encode(channels_last(self.encoder(images)))}

    def decode(self, vectors: dict[str, Tensor]) -> Tensor:
        return self.decoder(channels_first(vectors[ONLY]))


class Autoencoder(DiscreteAutoencoder):
    """The VQ-VAE."""

    block_types = (ResidualBlock,)

    def __init__(self, config: AutoencoderConfig, quantizer: Quantizer) -> None:
        super().__init__(
            _encoder(config),
            quantizer,
            _decoder(config),
            shrinkage=2**config.downsampling,
            pixel_mean=config.pixel_mean,
            pixel_deviation=config.pixel_deviation,
            critics=config,
        )
        self.config = config


def channels_last(features: Tensor) -> Tensor:
    """``(batch, channels, h, w)`` → ``(batch, h, w, channels)``, as quantizers want it."""
    return features.permute(0, 2, 3, 1)


def channels_first(vectors: Tensor) -> Tensor:
    """``(batch, h, w, channels)`` → ``(batch, channels, h, w)``, as convolutions want it."""
    return vectors.permute(0, 3, 1, 2)


def of_colours(statistic: Statistic, images: Tensor) -> float | Tensor:
    """One number, or those of each colour as ``(3, 1, 1)``."""
    return images.new_tensor(statistic).view(3, 1, 1) if isinstance(statistic, tuple) else statistic


def stem_widths(channels: int, downsampling: int) -> list[int]:
    """Channels after each halving: half the width after the first of several, the full width after the others."""
    first = [channels // 2] if downsampling > 1 else []
    return first + [channels] * (downsampling - len(first))


def _alone(levels: dict[str, Tensor]) -> Codes:
    return levels.get(ONLY, levels)


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
