"""The encoder and decoder of VQGAN (Esser et al., arXiv 2012.09841), with a discriminator where one is asked for.

Levels of residual blocks with group normalisation and swish, halved in size from one to the next; attention at the
smallest; between encoder, quantizer and decoder convolutions of one pixel. LDM's (arXiv 2112.10752) and LlamaGen's
(arXiv 2406.06525) tokenizers have the same net. In: images in [0, 1]. Out: as of every autoencoder.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from pipeline.models.autoencoder import DiscreteAutoencoder, channels_first, channels_last
from pipeline.models.config import VQGANConfig
from pipeline.quantizers import Quantizer


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class SwishBlock(nn.Module):
    """``x + conv3(swish(norm(conv3(swish(norm(x))))))``; another width goes past by a convolution of one pixel."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _norm(before),
            nn.SiLU(),
            nn.Conv2d(before, after, 3, padding=1),
            _norm(after),
            nn.SiLU(),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, features: Tensor) -> Tensor:  # (batch, channels, height, width)
        return self.layers(features) + self.shortcut(features)


class AttentionBlock(nn.Module):
    """``x`` plus one head of attention of every place to every other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.output = nn.Conv2d(channels, channels, 1)

    def forward(self, features: Tensor) -> Tensor:  # (batch, channels, height, width)
        normalised = self.norm(features)
        query, key, value = (  # (batch, height · width, channels)
            channels_last(each(normalised)).flatten(1, 2) for each in (self.query, self.key, self.value)
        )
        found = functional.scaled_dot_product_attention(query, key, value)
        return features + self.output(channels_first(found.unflatten(1, features.shape[2:])))


class Halving(nn.Module):
    """A convolution of stride 2 that is padded at the right and below only, as published."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, features: Tensor) -> Tensor:
        return self.convolution(functional.pad(features, (0, 1, 0, 1)))


class Doubling(nn.Module):
    """The nearest pixel, and a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        return self.convolution(functional.interpolate(features, scale_factor=2.0, mode="nearest"))


class VQGAN(DiscreteAutoencoder):
    """Loss: absolute and squared error, each with its weight, and the quantizer's."""

    block_types = (SwishBlock, AttentionBlock)

    def __init__(self, config: VQGANConfig, quantizer: Quantizer) -> None:
        super().__init__(
            _encoder(config),
            quantizer,
            _decoder(config),
            shrinkage=2 ** (len(config.multipliers) - 1),
            pixel_mean=config.pixel_mean,
            pixel_deviation=config.pixel_deviation,
            critics=config,
        )
        self.config = config

    def reconstruction_losses(self, decoded: Tensor, images: Tensor) -> dict[str, Tensor]:
        error = decoded - images
        losses = {}
        if self.config.absolute_weight:
            losses["absolute"] = self.config.absolute_weight * error.abs().sum()
        if self.config.squared_weight:
            losses["reconstruction"] = self.config.squared_weight * error.square().sum()
        return losses


def _encoder(config: VQGANConfig) -> nn.Sequential:
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    layers: list[nn.Module] = [nn.Conv2d(3, config.channels, 3, padding=1)]
    width, last = config.channels, len(widths) - 1
    for level, after in enumerate(widths):
        for _ in range(config.residual_layers):
            layers.append(SwishBlock(width, after))
            width = after
            if last - level < config.attention_levels:
                layers.append(AttentionBlock(width))
        if level < last:
            layers.append(Halving(width))
    layers += _middle(width)
    layers += [_norm(width), nn.SiLU(), nn.Conv2d(width, config.net_dim, 3, padding=1)]
    return nn.Sequential(*layers, nn.Conv2d(config.net_dim, config.latent_dim, 1))


def _decoder(config: VQGANConfig) -> nn.Sequential:
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    width, last = widths[-1], len(widths) - 1
    layers: list[nn.Module] = [nn.Conv2d(config.latent_dim, config.net_dim, 1)]
    layers += [nn.Conv2d(config.net_dim, width, 3, padding=1), *_middle(width)]
    for level in range(last, -1, -1):
        for _ in range(config.residual_layers + 1):
            layers.append(SwishBlock(width, widths[level]))
            width = widths[level]
            if last - level < config.attention_levels:
                layers.append(AttentionBlock(width))
        if level:
            layers.append(Doubling(width))
    return nn.Sequential(*layers, _norm(width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))


def _middle(width: int) -> list[nn.Module]:
    return [SwishBlock(width, width), AttentionBlock(width), SwishBlock(width, width)]
