"""Configuration of the image classifiers with quantized features.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

WIDTHS = {"resnet18": 128, "alexnet": 256}
"""Channels where the quantizer stands: after ResNet's second stage, after AlexNet's convolutions."""


class ClassifierConfig(BaseModel):
    """The nets of Huh et al. (arXiv 2305.08842, section 5): a quantizer in the middle of a classifier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["speech", "image"]] = "image"

    kind: Literal["classifier"] = "classifier"
    architecture: Literal["resnet18", "alexnet", "vit"] = Field(
        "resnet18",
        description="the quantizer stands after layer2, between convolutions and linear layers, or after a block",
    )
    classes: int = Field(ge=2, description="of the data set: folders of the tree that was prepared")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    dropout: float | None = Field(None, ge=0, lt=1, description="alexnet: before its linear layers; none means 0.5")
    patch: int = Field(16, ge=1, description="vit: side of a patch in pixels")
    width: int = Field(192, ge=4, multiple_of=4, description="vit: size of a token")
    depth: int = Field(12, ge=2, description="vit: blocks")
    heads: int = Field(3, ge=1, description="vit: attention heads of a block")
    quantize_after: int = Field(6, ge=1, description="vit: blocks before the quantizer")
    pixel_mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="subtracted from red, green and blue in [0, 1]; ImageNet's by default"
    )
    pixel_deviation: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="divides them")

    @property
    def quantizer_input(self) -> tuple[int, str]:
        """Size of the vectors that go into the quantizer, and the key that decides it."""
        if self.architecture == "vit":
            return self.width, "model.width"
        return WIDTHS[self.architecture], "model.architecture"

    @model_validator(mode="after")
    def _options_mean_something(self) -> ClassifierConfig:
        if self.architecture != "alexnet" and self.dropout is not None:
            raise ValueError(f"dropout={self.dropout} means nothing for architecture={self.architecture}: leave it out")
        if self.architecture != "vit":
            for name in ("patch", "width", "depth", "heads", "quantize_after"):
                value, default = getattr(self, name), type(self).model_fields[name].default
                if value != default:
                    raise ValueError(f"{name}={value} means nothing for architecture={self.architecture}: leave it out")
            return self
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} can't share width={self.width}: use a divisor")
        if self.quantize_after >= self.depth:
            raise ValueError(
                f"quantize_after={self.quantize_after} leaves none of depth={self.depth} behind the quantizer: use "
                f"{self.depth - 1} or fewer"
            )
        return self
