"""Configuration of ViT-SOM.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.models.image_config import Positive


class ViTSOMConfig(BaseModel):
    """A small vision transformer with a self-organising map beside its decoder or head (Luo and Yuan, IEEE Signal
    Processing Letters 2025)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads: ClassVar[Literal["speech", "image"]] = "image"
    quantizers: ClassVar[tuple[str, ...]] = ("som", "identity")
    """Kinds that stand beside the net: others' vectors would be for nothing."""

    kind: Literal["vit_som"] = "vit_som"
    task: Literal["clustering", "classification"] = Field(
        "clustering", description="clustering: a decoder gives the image back; classification: a head names its class"
    )
    image_size: int = Field(28, ge=8, description="side of an image in pixels, the same as data.image_size")
    channels: Literal[1, 3] = Field(3, description="1: the net sees grey values")
    patch: int = Field(2, ge=1, description="side of a patch in pixels")
    width: int = Field(16, ge=4, description="size of a token")
    depth: int = Field(4, ge=1, description="transformer blocks of the encoder")
    heads: int = Field(2, ge=1, description="attention heads, of the decoder too")
    decoder_width: int = Field(4, ge=4, description="clustering: size of a token in the decoder")
    decoder_depth: int = Field(2, ge=1, description="clustering: transformer blocks of the decoder")
    classes: int | None = Field(None, ge=2, description="classification: how many classes the data set has")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="classification: share of the target on all classes")
    pixel_mean: float | tuple[float, float, float] = Field(
        0.0, description="classification: subtracted from pixels in [0, 1]; one number, or one of each colour"
    )
    pixel_deviation: Positive | tuple[Positive, Positive, Positive] = Field(
        1.0, description="classification: divides them"
    )

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch

    @property
    def quantizer_input(self) -> tuple[int, str]:
        """Size of what the map compares, all patch tokens of an image in a row, and the keys that decide it."""
        return self.grid**2 * self.width, "(model.image_size / model.patch)² · model.width"

    @model_validator(mode="after")
    def _sizes_fit(self) -> Any:
        if self.image_size % self.patch:
            sides = [side for side in range(1, self.image_size + 1) if self.image_size % side == 0]
            raise ValueError(
                f"patch={self.patch} does not divide image_size={self.image_size}: use patch="
                + ", ".join(map(str, sides[:-1]))
            )
        names = ["width"] + (["decoder_width"] if self.task == "clustering" else [])
        for name in names:
            size = getattr(self, name)
            if size % 4 or size % self.heads:
                raise ValueError(
                    f"{name}={size}: two axes with sines and cosines each need a multiple of 4, and heads={self.heads} "
                    f"one of {self.heads}"
                )
        if (self.classes is None) != (self.task == "clustering"):
            needs = "give the number of classes" if self.classes is None else "leave it out"
            raise ValueError(f"classes={self.classes} with task={self.task}: {needs}")
        for name in ("pixel_mean", "pixel_deviation"):
            if self.channels == 1 and isinstance(getattr(self, name), tuple):
                raise ValueError(f"{name}={list(getattr(self, name))} with channels=1: give one number")
        if self.task == "clustering" and (self.pixel_mean, self.pixel_deviation) != (0.0, 1.0):
            raise ValueError("pixel_mean and pixel_deviation are for task=classification: leave them out")
        return self
