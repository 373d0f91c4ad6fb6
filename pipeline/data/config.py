"""Configuration of the data a run reads and of its micro-batches.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

SAMPLE_RATE = 16_000  # Hz; preparation resamples everything to it


class DataConfig(BaseModel):
    """Which prepared data set is read, and how its samples become tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = Field(None, description="folder made by `tessera prepare`")
    split: str = Field("train", min_length=1, description="split of the data set to train on")

    min_seconds: float = Field(1.0, ge=0.1, description="speech: shorter clips are left out of training")
    max_seconds: float = Field(15.6, gt=0, description="speech: longer clips are cropped, elsewhere each epoch")
    bucket_seconds: float = Field(0.5, gt=0, description="speech: clips of a length within this trade places")
    normalise: bool = Field(True, description="speech: each clip to zero mean and unit variance")

    image_size: int = Field(64, ge=8, description="images: side of the square that the model sees, in pixels")
    resize: int | None = Field(None, ge=8, description="images: shorter side before the crop; none means image_size")
    random_crop: bool = Field(True, description="images: draw the crop's place; otherwise the centre")
    flip: bool = Field(True, description="images: mirror every other image, drawn per sample")

    threads: int = Field(2, ge=1, description="decoding threads on each rank")
    prefetch: int = Field(2, ge=1, description="optimiser steps that are decoded ahead")
    max_bad: int = Field(20, ge=0, description="samples that may fail to decode on a rank before the run stops")

    @property
    def min_samples(self) -> int:
        """Shortest training clip in audio samples."""
        return round(self.min_seconds * SAMPLE_RATE)

    @property
    def max_samples(self) -> int:
        """Crop length in audio samples."""
        return round(self.max_seconds * SAMPLE_RATE)

    @model_validator(mode="after")
    def _lengths_agree(self) -> DataConfig:
        if self.max_seconds < self.min_seconds:
            raise ValueError(
                f"max_seconds={self.max_seconds} is less than min_seconds={self.min_seconds}: no clip would be left"
            )
        if self.resize is not None and self.resize < self.image_size:
            raise ValueError(
                f"resize={self.resize} is less than image_size={self.image_size}: use {self.image_size} or more"
            )
        return self


class BatchConfig(BaseModel):
    """The global batch of one optimiser step, as a number of micro-batches (design rule 1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    micro_batches: int = Field(8, ge=1, description="micro-batches in the global batch, over all ranks")
    seconds: float | None = Field(None, gt=0, description="speech: cap on padded seconds in a micro-batch")
    samples: int | None = Field(None, ge=1, description="images: how many are in a micro-batch")

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        if self.seconds is not None and self.samples is not None:
            raise ValueError(
                f"seconds={self.seconds} and samples={self.samples} can't both size a micro-batch: "
                "keep seconds for speech or samples for images"
            )
        return self
