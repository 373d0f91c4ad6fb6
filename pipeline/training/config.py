"""Configuration of the training run: optimiser, schedule, engine, codebooks and loop.

Pure pydantic, no torch: the schema and the command line read it without loading a library.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OptimizerConfig(BaseModel):
    """AdamW, Adam or SGD; codebooks, norms and biases never get weight decay."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = Field(5e-4, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.98), description="adamw and adam: decay rates of the two moments")
    epsilon: float = Field(1e-6, gt=0, description="adamw and adam: added to the root of the second moment")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: share of the steps before that goes on")
    weight_decay: float = Field(0.01, ge=0)

    @property
    def moments(self) -> int:
        """Numbers that are kept of each weight."""
        return 2 if self.kind != "sgd" else int(self.momentum > 0)

    @model_validator(mode="after")
    def _momentum_belongs_to_sgd(self) -> OptimizerConfig:
        if self.momentum and self.kind != "sgd":
            raise ValueError(
                f"momentum={self.momentum} means nothing for kind={self.kind}, whose first of betas it is: use 0, or "
                "kind=sgd"
            )
        return self


class ScheduleConfig(BaseModel):
    """Learning rate as a factor of the peak, a pure function of the step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["constant", "polynomial", "cosine", "tri_stage", "step"] = "polynomial"
    warmup_steps: int = Field(0, ge=0, description="linear rise from 0 to the peak")
    hold_steps: int = Field(0, ge=0, description="tri_stage only: steps at the peak before the decay")
    final_factor: float = Field(0.0, ge=0, le=1, description="factor reached at the last step; not of step")
    power: float = Field(1.0, gt=0, description="polynomial only: 1 is a straight line")
    milestones: tuple[int, ...] = Field(
        (), description="step only: steps from which on the rate is factor times as high"
    )
    factor: float = Field(0.1, gt=0, lt=1, description="step only: of the rate, at each milestone")

    @model_validator(mode="after")
    def _hold_belongs_to_tri_stage(self) -> ScheduleConfig:
        if self.hold_steps and self.kind != "tri_stage":
            raise ValueError(
                f"hold_steps={self.hold_steps} means nothing for kind={self.kind}: use kind=tri_stage or 0"
            )
        rising = all(one < next_one for one, next_one in zip(self.milestones, self.milestones[1:], strict=False))
        if self.kind == "step" and not (self.milestones and rising and self.milestones[0] > self.warmup_steps):
            raise ValueError(
                f"milestones={list(self.milestones)} of kind=step: use steps that rise and come after "
                f"warmup_steps={self.warmup_steps}, such as [30000, 60000]"
            )
        if self.kind != "step" and self.milestones:
            raise ValueError(f"milestones={list(self.milestones)} mean nothing for kind={self.kind}: use kind=step")
        return self


class EngineConfig(BaseModel):
    """What DeepSpeed does with the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what is partitioned: 1 optimiser, 2 + gradients, 3 + weights"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of matrix products and activations; weights and codebook state are always fp32"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0 switches clipping off")
    deterministic: bool = Field(
        True, description="refuse nondeterministic torch kernels where torch knows a better one"
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the inputs of transformer layers or residual blocks; compute the rest again backward",
    )
    compile: bool = Field(False, description="torch.compile of each transformer layer or residual block")


class CodebookConfig(BaseModel):
    """What happens to codebooks around the steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    initialise: Literal["none", "kmeans"] = Field("none", description="how codes are set before the first step")
    initialise_steps: int = Field(1, ge=1, description="global batches that k-means sees")
    check_every: int = Field(100, ge=1, description="steps between two comparisons of the ranks' codebook checksums")


class TrainingConfig(BaseModel):
    """The loop's lengths and intervals, in optimiser steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1, description="optimiser steps of the whole run")
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(1000, ge=1)
    keep_checkpoints: int = Field(3, ge=1, description="how many of the newest checkpoints stay")
    keep_every: int = Field(0, ge=0, description="checkpoints of every so many steps stay too; 0: none")
    keep_best: bool = Field(False, description="the checkpoint with the least training loss stays too")
    weight_ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share that an average of the weights, for evaluation and exports, keeps at each step; 0: none",
    )
    max_skipped: int = Field(
        5, ge=1, description="steps in a row without a finite loss and gradient, which are skipped, that end the run"
    )
    collective_timeout: int = Field(600, ge=10, description="seconds after which a missing peer is an error")
    wandb: str | None = Field(
        None, min_length=1, description="project of Weights & Biases that gets the log too; needs the package wandb"
    )
