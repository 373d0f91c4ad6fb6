"""Residual quantization: each level quantizes what the levels before it have left over; a token gets a code of each.

Zeghidour et al., "SoundStream", arXiv 2107.03312, section III-C. In: latents. Out: the sum of the levels' codes. State:
that of the levels, each a quantizer of another kind.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator
from torch import Tensor, nn

from pipeline.quantizers.affine import AffineConfig, AffineQuantizer
from pipeline.quantizers.base import ProjectionOptions, Quantized, Quantizer, QuantizerOutput, straight_through
from pipeline.quantizers.ema import EMAConfig, EMAQuantizer
from pipeline.quantizers.gd_som import GDSOMConfig, GDSOMQuantizer
from pipeline.quantizers.ksom import KSOMConfig, KSOMQuantizer
from pipeline.quantizers.simvq import SimVQConfig, SimVQQuantizer
from pipeline.quantizers.ste import STEConfig, STEQuantizer

LEVEL_KINDS: dict[str, Any] = {
    "ema": EMAQuantizer,
    "ksom": KSOMQuantizer,
    "gd_som": GDSOMQuantizer,
    "ste": STEQuantizer,
    "affine": AffineQuantizer,
    "simvq": SimVQQuantizer,
}
"""What a level can be: kinds that look for the nearest code and pass the gradient straight through."""

LevelConfig = Annotated[
    EMAConfig | KSOMConfig | GDSOMConfig | STEConfig | AffineConfig | SimVQConfig, Field(discriminator="kind")
]

OF_THE_WHOLE = ("dim", "codes", "groups", "codebook_dim")
"""Options that are the whole quantizer's, not a level's."""


class ResidualConfig(ProjectionOptions):
    """Residual quantization."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["residual"] = "residual"
    dim: int | None = Field(None, ge=1, description="size of a quantized vector; none: the model supplies it")
    codes: int = Field(512, ge=2, description="codes in each level's codebook")
    levels: int = Field(4, ge=2, description="codebooks whose codes add up to a vector")
    level: LevelConfig = Field(
        default_factory=EMAConfig, description="kind of the levels, and the options of that kind; none: ema"
    )
    dropout: float = Field(
        0.0, ge=0, le=1, description="share of forwards in training that use only a random number of first levels"
    )

    @model_validator(mode="before")
    @classmethod
    def _level_has_the_codes(cls, values: Any) -> Any:
        """A level is validated with the number of codes that it will have, on which a grid depends, for example."""
        if not isinstance(values, Mapping):
            return values
        level = values.get("level")
        if isinstance(level, BaseModel):
            level = {name: value for name, value in level.model_dump().items() if name not in OF_THE_WHOLE}
        if not isinstance(level, Mapping | None):
            return values
        level = {"kind": "ema", **(level or {})}
        for name in OF_THE_WHOLE:
            if name in level:
                raise ValueError(
                    f"level.{name}={level[name]!r} is not a level's own: leave it out"
                    + ("" if name == "groups" else f", {name} is the same for all of them")
                )
        codes = values.get("codes")
        return {**values, "level": level if codes is None else {**level, "codes": codes}}

    @model_validator(mode="after")
    def _levels_can_add_up(self) -> Any:
        normalise = getattr(self.level, "normalise", "none")
        if normalise != "none":
            raise ValueError(
                f"level.normalise={normalise} bounds what a level sees, and what is left over could not add up to "
                "latents: use none"
            )
        return self

    @field_serializer("level", mode="wrap")
    def _without_what_is_the_wholes(self, level: Any, serialise: Callable[[Any], Any]) -> Any:
        return {name: value for name, value in serialise(level).items() if name not in OF_THE_WHOLE}

    @property
    def groups(self) -> int:
        """Codes of a token."""
        return self.levels


class ResidualQuantizer(Quantizer):
    """Level l quantizes r_l = z − sg(Σ_{j<l} c_j), and the vector is Σ c_l, with the gradient straight through to z.

    Each loss of the levels is averaged over those in use, as EnCodec does, so that its weight means the same for any
    number of them. Since only codes are detached in r_l, every level's commitment pulls at z. Learned codes get the
    share of the task's gradient that ``level.sync_nu`` gives them.

    With ``dropout`` a forward in training uses, as often as that, only the first n levels, n from 1 … ``levels`` with
    equal chances, drawn from torch's CPU generator; their codes are −1 and add nothing.

    Health, replacement and synchronisation see the levels, ``levels.0`` …, as quantizers of their own.
    """

    config: ResidualConfig
    levels: nn.ModuleList

    def __init__(self, config: ResidualConfig) -> None:
        assert config.dim is not None
        super().__init__(config, dim=config.dim, codes=config.codes, groups=config.levels)
        self.code_dim = self.codebook_dim  # of each level: they add up
        self._shapes.clear()  # the levels count their codes
        level = config.level.model_copy(update={"dim": self.codebook_dim})
        self.levels = nn.ModuleList(LEVEL_KINDS[level.kind](level) for _ in range(config.levels))

    def quantize(self, latents: Tensor) -> Quantized:
        kept = self._draw_kept()
        nothing = torch.zeros(len(latents), dtype=torch.bool, device=latents.device)
        total = torch.zeros_like(latents)
        own_gradients = torch.zeros_like(latents)  # of codes that get a share of the task's; the value stays 0
        outputs: list[QuantizerOutput] = []
        for number, level in enumerate(self._quantizers()):
            left = latents - total
            # A dropped level is called too, for its place in the global batch: the n-th forward since the last step on
            # rank r of W is micro-batch n·W + r.
            output = level(left, None if number < kept else nothing)
            outputs.append(output)
            total = total + output.vectors.detach()
            if getattr(level.config, "sync_nu", 0.0) > 0:
                # A dropped level's are none, but ranks that draw other levels must go through the same modules: ZeRO 3
                # compares them.
                own_gradients = own_gradients + (output.vectors - output.vectors.detach())
                if number < kept:  # its vectors bring the gradient that goes straight through, too
                    own_gradients = own_gradients - (left - left.detach())
        names = outputs[0].losses
        return Quantized(
            straight_through(latents, total) + own_gradients,
            torch.cat([output.codes for output in outputs], dim=-1),
            {name: torch.stack([output.losses[name] for output in outputs]).sum() / kept for name in names},
            usage=torch.cat([output.usage for output in outputs]),
        )

    def assign(self, latents: Tensor) -> Tensor:
        total = torch.zeros_like(latents)
        codes = []
        for level in self._quantizers():
            codes.append(level.encode(latents - total))
            total = total + level.decode(codes[-1])
        return torch.cat(codes, dim=-1)

    def codebook(self) -> Tensor:
        return torch.cat([level.codebook() for level in self._quantizers()])

    def vectors_of(self, codes: Tensor) -> Tensor:
        of_levels = zip(self._quantizers(), codes.split(1, dim=-1), strict=True)
        return torch.cat([level.vectors_of(of_level) for level, of_level in of_levels], dim=1)

    def join_groups(self, vectors: Tensor) -> Tensor:
        return functools.reduce(torch.add, vectors.unbind(dim=-2))  # in the order of quantize, bit for bit

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        for number, level in enumerate(self._quantizers()):
            of_level = slice(number, number + 1)
            level.set_codebook(codebook[of_level], None if counts is None else counts[of_level])

    @torch.no_grad()
    def fit_codebook(self, latents: Tensor, cluster: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        """Level by level, each on what the fitted levels before it leave over."""
        left = latents
        for level in self._quantizers():
            level.fit_codebook(left, cluster)
            left = left - level.decode(level.encode(left))

    def _draw_kept(self) -> int:
        """How many first levels this forward uses."""
        if not (self.training and self.config.dropout):
            return len(self.levels)
        drops = bool(torch.rand(()) < self.config.dropout)
        number = int(torch.randint(1, len(self.levels) + 1, ()))
        return number if drops else len(self.levels)

    def _quantizers(self) -> list[Quantizer]:
        return list(self.levels)  # type: ignore[arg-type]  # modules, to mypy
