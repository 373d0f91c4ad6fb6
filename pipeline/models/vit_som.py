"""ViT-SOM: a vision transformer whose patch tokens, all in a row, a self-organising map orders while it learns.

Luo and Yuan, "Simple Self-Organizing Map with Visual Transformer", IEEE Signal Processing Letters 2025, DOI
10.1109/LSP.2025.3643388; the net is that of He et al.'s masked autoencoder (arXiv 2111.06377) without masks, with the
sizes of the code that the former published. In: images in [0, 1]. Out: reconstructions or classes, the place of each
image on the map, and the losses of a micro-batch.

The map stands beside decoder and head, which see the tokens themselves. Layer-wise decay of the learning rate, which
the published configurations name, has no effect in the published code and is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.data.collation import ImageBatch
from pipeline.models.base import StepOutput, quantizer_losses, quantizer_metrics
from pipeline.models.vit_som_config import ViTSOMConfig
from pipeline.quantizers import Quantizer

MLP_RATIO = 4
EPSILON = 1e-6
LUMA = (0.299, 0.587, 0.114)
"""Red, green and blue in a grey value: ITU-R BT.601."""


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=EPSILON)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = nn.Sequential(nn.Linear(width, MLP_RATIO * width), nn.GELU(), nn.Linear(MLP_RATIO * width, width))

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, tokens, width)
        batch, number, width = tokens.shape
        joined = self.query_key_value(self.attention_norm(tokens))
        # (3, batch, heads, tokens, width of a head)
        parts = joined.reshape(batch, number, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts.unbind())
        tokens = tokens + self.projection(attended.transpose(1, 2).reshape(batch, number, width))
        return tokens + self.mlp(self.mlp_norm(tokens))


class Decoder(nn.Module):
    """Tokens ``(batch, 1 + patches, width)``, the class token first, → pixels of each patch
    ``(batch, patches, values)``."""

    def __init__(self, config: ViTSOMConfig) -> None:
        super().__init__()
        width = config.decoder_width
        self.embedding = nn.Linear(config.width, width)
        self.register_buffer("positions", sine_positions(config.grid, width), persistent=False)
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.to_pixels = nn.Linear(width, config.patch**2 * config.channels)

    positions: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        decoded = self.embedding(tokens) + self.positions
        for block in self.blocks:
            decoded = block(decoded)
        return self.to_pixels(self.norm(decoded))[:, 1:]


class Inference(NamedTuple):
    """What the net makes of a batch of images."""

    latents: Tensor
    """What the map compares: ``(batch, patches · width)``."""
    images: Tensor | None
    """What a decoder has to give back, ``(batch, channels, height, width)`` in [0, 1]."""
    reconstruction: Tensor | None
    """What it gives, clipped to [0, 1]."""
    logits: Tensor | None
    """``(batch, classes)`` of a head."""


class ViTSOM(nn.Module):
    """Images to tokens; the quantizer's map beside a decoder (``task`` clustering) or a head (classification).

    Losses: absolute error of pixels, or cross-entropy with smoothed labels; plus the map's.
    """

    positions: Tensor
    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(self, config: ViTSOMConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.register_buffer("positions", sine_positions(config.grid, config.width), persistent=False)
        self.encoder = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=EPSILON)
        self.quantizer = quantizer
        self.decoder = Decoder(config) if config.task == "clustering" else None
        self.head = nn.Linear(config.width, config.classes) if config.classes else None
        for name in ("pixel_mean", "pixel_deviation"):
            values = torch.tensor(getattr(config, name)).reshape(-1, 1, 1)  # (channels or 1, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self._initialise()

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that may be computed twice, and compiled."""
        return [*self.encoder, *(self.decoder.blocks if self.decoder is not None else [])]

    def forward(self, batch: ImageBatch) -> StepOutput:
        """Losses and metrics of one micro-batch. Raises ValueError for images of another size, and in classification
        for images without a label or with one that the head does not have."""
        images = self._images(batch.pixels)
        # Only what enters the net takes its precision: targets in bf16 would be off by up to half a grey level.
        tokens = self._encode(images)
        output = self.quantizer(tokens[:, 1:].flatten(start_dim=1))
        number = torch.tensor(float(len(images)), device=images.device)
        if self.decoder is not None:
            error = self._decode(tokens).float() - images
            values = torch.tensor(float(images.numel()), device=images.device)
            losses = {"reconstruction": error.abs().mean() * batch.targets}
            metrics = {"mse": (error.detach().square().sum(), values)}
        else:
            assert self.head is not None
            assert self.config.classes is not None
            labels = batch.classes(self.config.classes)
            logits = self.head(tokens[:, 0]).float()
            smoothed = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            losses = {"classification": smoothed * batch.targets}
            metrics = {"class_accuracy": ((logits.argmax(dim=1) == labels).sum(), number)}
        return StepOutput(
            losses=losses | quantizer_losses(output, batch.targets),
            metrics=metrics | quantizer_metrics(output),
            quantizer=output,
        )

    @torch.no_grad()
    def infer(self, pixels: Tensor) -> Inference:
        """All that the net makes of ``pixels (batch, 3, height, width)`` in [0, 1]."""
        images = self._images(pixels)
        tokens = self._encode(images)
        return Inference(
            latents=tokens[:, 1:].flatten(start_dim=1),
            images=images if self.decoder is not None else None,
            reconstruction=self._decode(tokens).float().clamp(0, 1) if self.decoder is not None else None,
            logits=self.head(tokens[:, 0]).float() if self.head is not None else None,
        )

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``pixels (batch, 3, height, width)`` in [0, 1] → reconstruction of the same shape from the tokens, clipped to
        [0, 1], and codes ``(batch, 1, 1, groups)``. Raises ValueError without a decoder."""
        found = self.infer(pixels)
        if found.reconstruction is None:
            raise ValueError("model.task=classification has no decoder: train with model.task=clustering")
        return found.reconstruction.expand_as(pixels), self.quantizer(found.latents).codes[:, None, None]

    @torch.no_grad()
    def encode_codes(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Codes ``(batch, 1, 1, groups)`` int64, and how many tokens each image has, ``(batch,)``: one."""
        tokens = self._encode(self._images(batch.pixels))
        codes = self.quantizer.encode(tokens[:, 1:].flatten(start_dim=1))
        return codes[:, None, None], torch.ones(len(codes), dtype=torch.int64)

    @torch.no_grad()
    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes ``(batch, 1, 1, groups)`` → their prototypes as pictures ``(batch, 3, height, width)`` in [0, 1].

        As published, the class token, which no prototype has, is 0. Prototypes of the cosine distance have a direction
        only: they get the length that tokens of the final norm have in the mean, features without correlation.
        """
        prototypes = self.quantizer.decode(codes[:, 0, 0])
        if getattr(self.quantizer.config, "distance", None) == "cosine":
            squares = self.norm.weight.square().sum() + self.norm.bias.square().sum()
            prototypes = prototypes * (self.config.grid**2 * squares).sqrt()
        tokens = prototypes.reshape(len(codes), -1, self.config.width)
        tokens = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], dim=1)
        return self._decode(tokens).float().clamp(0, 1).expand(-1, 3, -1, -1)

    def _images(self, pixels: Tensor) -> Tensor:
        """What the net sees, and has to give back: ``(batch, channels, height, width)``, normalised."""
        side = self.config.image_size
        if pixels.shape[-2:] != (side, side):
            raise ValueError(
                f"images of {pixels.shape[-2]}×{pixels.shape[-1]} don't fit model.image_size={side}: use "
                "data.image_size and model.image_size of one value"
            )
        if self.config.channels == 1:
            pixels = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(LUMA)).unsqueeze(1).clamp(max=1)
        return (pixels - self.pixel_mean) / self.pixel_deviation

    def _encode(self, images: Tensor) -> Tensor:
        """→ tokens ``(batch, 1 + patches, width)``, the class token first."""
        patches = self.patches(images.to(self.patches.weight.dtype)).flatten(start_dim=2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(patches), -1, -1), patches], dim=1) + self.positions
        for block in self.encoder:
            tokens = block(tokens)
        return self.norm(tokens)

    def _decode(self, tokens: Tensor) -> Tensor:
        """Tokens → images ``(batch, channels, height, width)``."""
        if self.decoder is None:
            raise ValueError("model.task=classification has no decoder: train with model.task=clustering")
        grid, patch, channels = self.config.grid, self.config.patch, self.config.channels
        values = self.decoder(tokens).reshape(len(tokens), grid, grid, patch, patch, channels)
        images = torch.einsum("byxvuc->bcyvxu", values)  # rows of patches, rows within a patch, and columns likewise
        return images.reshape(len(tokens), channels, grid * patch, grid * patch)

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("quantizer."):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patches.weight.detach().flatten(start_dim=1))  # as if it were a Linear
        nn.init.normal_(self.class_token, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)


def sine_positions(grid: int, width: int) -> Tensor:
    """Fixed positions of a class token, zeros, and of ``grid · grid`` patches by rows: fp32 ``(1, 1 + grid², width)``.

    A quarter of the features each: sine and cosine of the column, sine and cosine of the row, at frequencies that fall
    from 1 to 1/10000 (He et al., arXiv 2111.06377).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # (grid, width / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = waves.repeat(grid, 1), waves.repeat_interleave(grid, dim=0)
    patches = torch.cat([columns, rows], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float().unsqueeze(0)
