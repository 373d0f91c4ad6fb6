"""Configuration of the data a run reads and of its micro-batches.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.data.storage import Place

SAMPLE_RATE = 16_000  # Hz; preparation resamples everything to it
LENGTH_BIN = 1_600  # audio samples: clips are counted by length in steps of 0.1 s
MAX_BINS = 6_000  # ten minutes: no clip is trained on that is longer
MIX_TURNS = 1_000  # micro-batches in which a mixture's weights come true, exactly


class MixedData(BaseModel):
    """One data set of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Place = Field(description="folder made by `tessera prepare`, or its URL")
    split: str = Field("train", min_length=1, description="split of the data set to train on")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="its share of the micro-batches, over the sum")


class DataConfig(BaseModel):
    """Which prepared data set is read, and how its samples become tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Place | None = Field(None, description="folder made by `tessera prepare`, or its URL")
    split: str = Field("train", min_length=1, description="split of the data set to train on")
    mix: tuple[MixedData, ...] = Field((), description="instead of path: several data sets, each with a weight")

    shuffle: Literal["window", "full"] = Field(
        "window", description="full shuffles all shards together, and holds a number for each sample in memory"
    )
    window_shards: int = Field(16, ge=1, description="shards that are shuffled together, and read at a time")
    min_seconds: float = Field(1.0, ge=0.1, description="speech: shorter clips are left out of training")
    max_seconds: float = Field(
        15.6,
        gt=0,
        le=MAX_BINS * LENGTH_BIN / SAMPLE_RATE,
        description="speech: longer clips are cropped, elsewhere each epoch",
    )
    bucket_seconds: float = Field(0.5, gt=0, description="speech: clips of a length within this trade places")
    normalise: bool = Field(True, description="speech: each clip to zero mean and unit variance")

    image_size: int = Field(64, ge=8, description="images: side of the square that the model sees, in pixels")
    fit: Literal["crop", "stretch"] = Field(
        "crop", description="images: how one becomes a square; stretch resizes both sides and cuts nothing off"
    )
    resize: int | None = Field(None, ge=8, description="images: shorter side before the crop; none means image_size")
    random_crop: bool = Field(True, description="images: draw the crop's place; otherwise the centre")
    crop_scale: tuple[float, float] | None = Field(
        None, description="images: draw a crop of such a share of the area, least and most, and resize it; none: no"
    )
    crop_ratio: tuple[float, float] = Field(
        (3 / 4, 4 / 3), description="images: width over height of crops by crop_scale, least and most"
    )
    flip: bool = Field(True, description="images: mirror every other image, drawn per sample")
    rand_augment: int = Field(
        0, ge=0, description="images: RandAugment's operations on each, as in torchvision; 0 means none"
    )
    rand_augment_magnitude: float = Field(9, ge=0, le=30, description="images: how strong these are, of 30")
    erasing: float = Field(0, ge=0, le=1, description="images: probability that a rectangle of one becomes noise")

    cache: Path | None = Field(None, description="folder for shards of remote data; none means one for temporary files")
    cache_gigabytes: float = Field(50.0, gt=0, description="how much of remote data is kept there, in 1e9 bytes")
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

    @property
    def sources(self) -> tuple[MixedData, ...]:
        """The data sets to read: those of the mixture, or the one at ``path``, or none."""
        if self.mix or self.path is None:
            return self.mix
        return (MixedData(path=self.path, split=self.split),)

    @model_validator(mode="after")
    def _one_way_to_name_data(self) -> DataConfig:
        if self.mix and self.path is not None:
            raise ValueError(f"path={self.path} and mix can't both name the data: keep one of them")
        if self.mix and self.split != "train":
            raise ValueError(f"split={self.split} means nothing with mix: give each data set of mix its own split")
        total = sum(each.weight for each in self.mix)
        for place, each in enumerate(self.mix):
            if each.weight * MIX_TURNS < total:
                raise ValueError(
                    f"mix.{place}.weight={each.weight:g} is less than one micro-batch in {MIX_TURNS} of all weights' "
                    f"{total:g}: use {total / MIX_TURNS:g} or more, or leave {each.path} out"
                )
        return self

    @model_validator(mode="after")
    def _lengths_are_counted(self) -> DataConfig:
        for name in ("min_seconds", "bucket_seconds"):
            bins = getattr(self, name) * SAMPLE_RATE / LENGTH_BIN
            if abs(bins - round(bins)) > 1e-6 or bins < 0.5:
                near = max(1, round(bins)) * LENGTH_BIN / SAMPLE_RATE
                raise ValueError(
                    f"{name}={getattr(self, name):g} is not a multiple of {LENGTH_BIN / SAMPLE_RATE:g} s, in which "
                    f"clips are counted by length: use {near:g}"
                )
        return self

    @model_validator(mode="after")
    def _lengths_agree(self) -> DataConfig:
        if self.max_seconds < self.min_seconds:
            raise ValueError(
                f"max_seconds={self.max_seconds} is less than min_seconds={self.min_seconds}: no clip would be left"
            )
        for name, most in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            limits = getattr(self, name)
            if limits is not None and not 0 < limits[0] <= limits[1] <= most:
                raise ValueError(
                    f"{name}={list(limits)}: use least and most, above 0" + (" and up to 1" if most == 1 else "")
                )
        if self.crop_scale is not None and not self.random_crop:
            raise ValueError(f"crop_scale={list(self.crop_scale)} means nothing with random_crop=false: leave one out")
        if self.crop_scale is not None and self.fit == "stretch":
            raise ValueError(f"crop_scale={list(self.crop_scale)} means nothing for fit=stretch, which crops nothing")
        if self.resize is not None and self.fit == "stretch":
            raise ValueError(f"resize={self.resize} means nothing for fit=stretch, which crops nothing: leave it out")
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
