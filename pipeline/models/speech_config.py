"""Configuration of the speech encoder.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.config import SAMPLE_RATE
from pipeline.data.masking import MaskingConfig, conv_frames

STANDARD_KERNELS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""(kernel, stride) of wav2vec 2.0's seven convolutions: 20 ms a frame, 25 ms receptive field."""


class Wav2Vec2Config(BaseModel):
    """wav2vec 2.0 (Baevski et al., arXiv 2006.11477): convolutions, a transformer, targets quantized."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["speech", "image"]] = "speech"

    kind: Literal["wav2vec2"] = "wav2vec2"
    conv_layers: tuple[tuple[int, int, int], ...] = Field(
        tuple((512, kernel, stride) for kernel, stride in STANDARD_KERNELS),
        min_length=1,
        description="(channels, kernel, stride) of each convolution of the feature extractor",
    )
    conv_norm: Literal["group", "layer"] = Field(
        "group", description="group: one group norm after the first convolution (BASE); layer: after each, with biases"
    )
    model_dim: int = Field(768, ge=8, description="width of the transformer")
    layers: int = Field(12, ge=1, description="transformer layers")
    heads: int = Field(12, ge=1, description="attention heads")
    ffn_dim: int = Field(3072, ge=1, description="inner width of the feed-forward layers")
    norm_order: Literal["post", "pre"] = Field("post", description="layer norm after (BASE) or before (LARGE) a block")
    position_kernel: int = Field(128, ge=1, description="kernel of the convolution that encodes positions")
    position_groups: int = Field(16, ge=1, description="groups of that convolution")
    dropout: float = Field(0.1, ge=0, lt=1, description="after attention, feed-forward layers and the encoder's input")
    attention_dropout: float = Field(0.1, ge=0, lt=1)
    ffn_dropout: float = Field(0.0, ge=0, lt=1, description="inside the feed-forward layers")
    feature_dropout: float = Field(0.1, ge=0, lt=1, description="of the extractor's output, and of the targets' input")
    layer_drop: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of transformer layers left out, drawn for each micro-batch, on any rank alike",
    )
    feature_gradient_scale: float = Field(0.1, gt=0, le=1, description="factor on the extractor's gradient")
    final_dim: int = Field(256, ge=1, description="dimension in which context and targets are compared")
    logit_temperature: float = Field(0.1, gt=0, description="κ: cosine similarities are divided by it")
    feature_penalty: float = Field(10.0, ge=0, description="weight of the features' mean square")
    masking: MaskingConfig = Field(default_factory=MaskingConfig)
    initialise_from: Path | None = Field(
        None,
        description="checkpoint of fairseq, fairseq2, Hugging Face or `tessera export` whose weights a new run starts "
        "with: a file, or a folder with config.json or recipe.yaml",
    )

    @property
    def feature_dim(self) -> int:
        """Channels of the last convolution."""
        return self.conv_layers[-1][0]

    @property
    def quantizer_input(self) -> tuple[int, str]:
        """Size of the vectors that go into the quantizer, and the key that decides it."""
        return self.feature_dim, "the last of model.conv_layers"

    @model_validator(mode="after")
    def _sizes_fit(self) -> Wav2Vec2Config:
        for number, layer in enumerate(self.conv_layers):
            if min(layer) < 1:
                raise ValueError(
                    f"conv_layers[{number}]={list(layer)} is no convolution: use [channels, kernel, stride], each 1 or "
                    "more, such as [512, 3, 2]"
                )
        if self.model_dim % self.heads:
            divisors = [number for number in range(1, 65) if self.model_dim % number == 0]
            raise ValueError(
                f"heads={self.heads} can't share model_dim={self.model_dim}: use {', '.join(map(str, divisors))}"
            )
        if self.model_dim % self.position_groups:
            raise ValueError(
                f"position_groups={self.position_groups} can't share model_dim={self.model_dim}: use a divisor of it"
            )
        if conv_frames(SAMPLE_RATE, self.conv_layers) < 1:
            raise ValueError("conv_layers see more than a second of audio in one frame: use smaller strides")
        return self
