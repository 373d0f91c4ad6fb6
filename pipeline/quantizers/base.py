"""What every quantizer is: one base class, one result, one set of options.

In: latents with channels last, and which of them are real. Out: quantized vectors, codes, losses. ``forward`` touches
nothing but pending statistics; codebooks change in ``apply_update`` only, which
:class:`pipeline.codebooks.CodebookSync` calls once an optimiser step with the statistics of all ranks (design rule 4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.quantizers.learned import LinearMap


class QuantizerOptions(BaseModel):
    """What every kind with a codebook is configured by."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: int | None = Field(None, ge=1, description="size of a quantized vector; none: the model supplies it")
    codes: int = Field(512, ge=2, description="codes in each group's codebook")
    groups: int = Field(1, ge=1, description="parts of a vector that are quantized each by a codebook of its own")

    @model_validator(mode="after")
    def _groups_divide(self) -> Any:
        inner = getattr(self, "codebook_dim", None)
        name, size = ("dim", self.dim) if inner is None else ("codebook_dim", inner)
        if size is not None and size % self.groups:
            divisors = [number for number in range(1, size + 1) if size % number == 0]
            raise ValueError(
                f"{name}={size} can't be split into groups={self.groups}: "
                f"use groups={', '.join(map(str, divisors[:8]))}"
            )
        return self


class ProjectionOptions(BaseModel):
    """For kinds whose codes may be smaller than latents."""

    codebook_dim: int | None = Field(
        None,
        ge=1,
        description="size of what is compared with codes, all groups together: latents are projected to it by a "
        "learned linear map and vectors back by another; none: dim, without maps",
    )


class NormaliseOptions(BaseModel):
    """For kinds whose latents and codes may be compared by direction only."""

    normalise: Literal["none", "l2"] = Field("none", description="l2: latents and codes of each group to length 1")


class ReplacementOptions(BaseModel):
    """For kinds whose dead codes can be moved to where latents are (Huh et al., arXiv 2305.08842, section 4.3)."""

    replace_after: int = Field(
        0, ge=0, description="steps in a row that a code may go unused before it moves to a latent; 0: it never moves"
    )
    replace_noise: float = Field(
        0.01, ge=0, description="noise on a replacement, in each feature, relative to the length of the latent"
    )

    @model_validator(mode="after")
    def _one_step_is_too_few(self) -> Any:
        if self.replace_after == 1:
            raise ValueError(
                "replace_after=1 would move every code that a single step does not use: use 0 (never) or 2 and more"
            )
        return self


class QuantizerOutput(NamedTuple):
    """What one forward gives; ``...`` is the latents' leading shape.

    A tuple, because ZeRO 3 hooks into the tensors of a module's output and looks for them in tuples and dicts only.
    """

    vectors: Tensor
    """``(..., dim)``, dtype of the latents, differentiable; zeros where the mask is False."""
    codes: Tensor
    """``(..., groups)`` int64; −1 where the mask is False."""
    losses: dict[str, Tensor]
    """Name → fp32 scalar, already weighted, mean over real tokens; 0 when there are none."""
    usage: Tensor
    """``(groups, codes)`` fp32: how often each code was chosen in this call."""
    metrics: dict[str, Tensor]
    """Name → detached scalar, for the log; may be empty."""


@dataclass
class Quantized:
    """What a kind makes of real tokens: the part of :class:`QuantizerOutput` that is its own."""

    vectors: Tensor  # (tokens, codebook_dim) fp32
    codes: Tensor  # (tokens, groups) int64
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    usage: Tensor | None = None  # (groups, codes) fp32, where it is not simply how often each code occurs


class InfiniteLatents(ValueError):
    """Latents hold NaN or infinity; the message says how many and of which quantizer."""


class Quantizer(nn.Module):
    """Base of all kinds. A kind implements :meth:`quantize`, :meth:`assign` and :meth:`codebook`, and where it keeps
    statistics of its own, :meth:`observe` and :meth:`update`.

    Checkpoint behaviour: parameters and buffers are in the state dict; both stay fp32 through ``.half()``,
    ``.bfloat16()`` and ``.to(dtype)``. Pending statistics are not in it: a checkpoint is written between steps, where
    there are none. Learned codes are parameters; an engine that puts parameters into its own precision itself, as
    DeepSpeed's does, keeps an fp32 master copy of them: kinds read them through ``.float()``.
    """

    updates: Tensor
    idle_steps: Tensor

    compares_latents = True
    """Whether codes lie in the space of the latents, so that the distance between the two means something."""

    spoils_infinite = False
    """What a trainer sets that skips a step whose loss is not finite on all ranks together: an error would end this
    rank alone. Statistics of that step are those of other latents and must be discarded."""

    _keep_in_fp32_modules_strict = ("*",)
    """transformers' name, which DeepSpeed asks every module for: buffers that its ``buffer_dtype`` must leave alone."""

    def __init__(
        self,
        config: Any,
        *,
        dim: int,
        codes: int,
        groups: int,
        input_dim: int | None = None,
        codebook_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dim, self.codes, self.groups = dim, codes, groups
        self.input_dim = dim if input_dim is None else input_dim
        self.codebook_dim = codebook_dim or getattr(config, "codebook_dim", None) or dim
        self.code_dim = self.codebook_dim // groups
        self.project_in: LinearMap | None = None
        self.project_out: LinearMap | None = None
        if self.codebook_dim != dim:
            self.project_in, self.project_out = LinearMap.pair(self.input_dim, self.codebook_dim, dim)
        self.name = "quantizer"  # in the model: CodebookSync's, for errors
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # optimiser steps done, for schedules
        # Pending statistics are no buffers: DistributedDataParallel would overwrite those by rank 0's.
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._room: dict[str, Tensor] = {}  # where they lie: CodebookSync's, if there is one
        self._pending: set[str] = set()  # those that something was added to since the last step
        self.process_group: Any = None  # CodebookSync's; None: all ranks
        # CodebookSync's, in steps that it watches: gets what each forward compared with codes, and what came of it
        self.watch: Callable[[Tensor, Quantized], None] | None = None
        if codes:
            self.declare_statistic("usage", groups, codes)
        self.replace_after: int = getattr(config, "replace_after", 0)
        if self.replace_after:
            # (groups, codes): optimiser steps since each code was last chosen
            self.register_buffer("idle_steps", torch.zeros(groups, codes, dtype=torch.int64))

    # -- what a kind implements ------------------------------------------------------------------------------------

    def quantize(self, latents: Tensor) -> Quantized:
        """Quantize real tokens as they are compared with codes, ``(tokens, codebook_dim)`` fp32, or ``input_dim`` where
        a kind has one of its own; there may be none of them."""
        raise NotImplementedError

    def assign(self, latents: Tensor) -> Tensor:
        """Codes at inference of what :meth:`quantize` gets: int64 ``(tokens, groups)``."""
        raise NotImplementedError

    def codebook(self) -> Tensor:
        """The effective codes: fp32 ``(groups, codes, dim // groups)``, detached; don't write into it. With a
        ``codebook_dim`` that takes the place of ``dim``."""
        raise NotImplementedError

    def vectors_of(self, codes: Tensor) -> Tensor:
        """The effective vectors of codes: int64 ``(tokens, groups)`` → fp32 ``(tokens, groups, code_dim)``."""
        return look_up(self.codebook(), codes)

    def prepare(self, latents: Tensor) -> Tensor:
        """Real latents ``(tokens, codebook_dim)`` as they are compared with codes: normalised, for example."""
        if getattr(self.config, "normalise", "none") == "none":
            return latents
        return self.normalise(self.split_groups(latents)).reshape(-1, self.codebook_dim)

    def normalise(self, vectors: Tensor) -> Tensor:
        """Vectors ``(..., code_dim)`` with the length that the configuration asks for."""
        return functional.normalize(vectors, dim=-1) if getattr(self.config, "normalise", "none") == "l2" else vectors

    def observe(self, latents: Tensor, codes: Tensor) -> None:
        """Add what this kind needs for its update to the pending statistics; called in training only, without grad."""

    def update(self, statistics: dict[str, Tensor]) -> None:
        """Change the codebook by one optimiser step's statistics, summed over ranks and micro-batches."""

    def set_codebook(self, codebook: Tensor, counts: Tensor | None = None) -> None:
        """Set the effective codes ``(groups, codes, code_dim)``; ``counts (groups, codes)``: tokens of each."""
        raise ValueError(f"quantizer kind {self.config.kind} has no codes that can be set from latents")

    def fit_codebook(self, latents: Tensor, cluster: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        """Set the codes by ``cluster``, which finds centres and their counts for latents
        ``(tokens, groups, code_dim)`` and a number of codes; ``latents`` are real ones, ``(tokens, codebook_dim)``."""
        self.set_codebook(*cluster(self.split_groups(latents), self.codes))

    def moved_codes(self, statistics: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Learned codes that one step's statistics move by themselves: which, bool ``(groups, codes)``, and where to,
        ``(groups, codes, code_dim)`` as this kind keeps them. The caller writes them by :meth:`replace_codes`, since an
        engine may keep copies of parameters."""
        return None

    def invert(self, effective: Tensor) -> Tensor:
        """Codes as this kind keeps them, for effective ones; both ``(groups, codes, code_dim)``."""
        return effective

    def replace_codes(self, chosen: Tensor, vectors: Tensor) -> None:
        """Write ``vectors``, ``(groups, codes, code_dim)`` as :meth:`invert` gives them, over the codes of ``chosen``,
        bool ``(groups, codes)``."""
        raise ValueError(f"quantizer kind {self.config.kind} has no codes that can be replaced")

    # -- what everyone calls ---------------------------------------------------------------------------------------

    def forward(self, z: Tensor, mask: Tensor | None = None) -> QuantizerOutput:
        """Quantize ``z (..., input_dim)``; ``mask (...)`` bool, True where a token is real.

        Raises ValueError, and changes nothing, for latents of another size, for a mask of another shape and for NaN or
        infinity in a real token; with :attr:`spoils_infinite` the last gives vectors and losses of NaN instead.
        """
        spoiled = False
        with torch.autocast(z.device.type, enabled=False):
            try:
                latents = self.real_latents(z, mask)
            except InfiniteLatents:
                if not self.spoils_infinite:
                    raise
                spoiled = True
                latents = self.real_latents(torch.nan_to_num(z, 0.0, 0.0, 0.0), mask)
            found = self.quantize(latents)
            vectors = found.vectors if self.project_out is None else self.project_out(found.vectors)
        usage = count_codes(found.codes, self.codes) if found.usage is None else found.usage
        if self.records():
            with torch.no_grad():
                if "usage" in self._shapes:
                    self.add_statistic("usage", usage)
                self.observe(latents.detach(), found.codes)
                if self.watch is not None:
                    self.watch(latents.detach(), found)
        vectors = _scatter(vectors.to(z.dtype), mask, z.shape[:-1], 0)
        codes = _scatter(found.codes, mask, z.shape[:-1], -1)
        losses = found.losses
        if spoiled:
            vectors, losses = vectors * torch.nan, {name: loss * torch.nan for name, loss in losses.items()}
        return QuantizerOutput(vectors, codes, losses, usage, found.metrics)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of ``z (..., input_dim)``: int64 ``(..., groups)``, −1 where the mask is False. Touches no state, in
        training mode or not. Raises as :meth:`forward` does."""
        with torch.autocast(z.device.type, enabled=False):
            return _scatter(self.assign(self.real_latents(z, mask)), mask, z.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Vectors of ``codes (..., groups)``: fp32 ``(..., dim)``; −1 (no token) becomes zeros.

        Raises ValueError for another number of groups and for a code that is not in the codebook.
        """
        if codes.shape[-1:] != (self.groups,):
            raise ValueError(f"codes have shape {tuple(codes.shape)}: the last axis must be groups={self.groups}")
        if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) >= self.codes):
            raise ValueError(
                f"codes lie in {int(codes.min())}…{int(codes.max())}: use 0…{self.codes - 1}, or -1 for no token"
            )
        vectors = self.vectors_of(codes.reshape(-1, self.groups).clamp(min=0))
        vectors = vectors.reshape(*codes.shape[:-1], self.groups, self.code_dim) * (codes >= 0).unsqueeze(-1)
        vectors = self.join_groups(vectors)
        if self.project_out is None:
            return vectors
        return self.project_out(vectors) * (codes >= 0).any(dim=-1, keepdim=True)

    def records(self) -> bool:
        """Whether a forward now adds statistics: in training, and not while autograd runs, since a forward then is an
        activation recomputed, seen before."""
        return self.training and torch._C._current_graph_task_id() == -1

    # -- pending statistics ----------------------------------------------------------------------------------------

    def declare_statistic(self, name: str, *shape: int) -> None:
        """Name a statistic that is summed over ranks each step; fp32 of this shape."""
        self._shapes[name] = shape

    def add_statistic(self, name: str, value: Tensor) -> None:
        """Add ``value`` to a pending statistic."""
        self.pending_statistic(name).add_(value)

    def pending_statistic(self, name: str) -> Tensor:
        """A pending statistic, to add to in place; zeros if nothing came since the last step."""
        room, device = self._room.get(name), self.updates.device
        if room is None or room.device != device:
            here = torch.empty(self._shapes[name], dtype=torch.float32, device=device)
            room = self._room[name] = here if room is None else here.copy_(room)
        if name not in self._pending:
            room.zero_()
            self._pending.add(name)
        return room

    def pending(self) -> list[Tensor]:
        """Statistics since the last step, in the order in which they were declared; zeros where nothing came. The next
        forward adds to these very tensors."""
        return [self.pending_statistic(name) for name in self._shapes]

    def keep_pending_in(self, room: list[Tensor]) -> None:
        """Let pending statistics lie in ``room``, tensors of the layout and device of :meth:`pending`, from now on."""
        for place, now in zip(room, self.pending(), strict=True):
            place.copy_(now)
        self._room = dict(zip(self._shapes, room, strict=True))

    def named_statistics(self, reduced: list[Tensor]) -> dict[str, Tensor]:
        """What :meth:`pending` gave, summed over ranks, by name; raises ValueError for another layout."""
        shapes = [tuple(tensor.shape) for tensor in reduced]
        if shapes != list(self._shapes.values()):
            raise ValueError(f"statistics have shapes {shapes}: {list(self._shapes.values())} were declared")
        return dict(zip(self._shapes, reduced, strict=True))

    @torch.no_grad()
    def apply_update(self, reduced: list[Tensor]) -> None:
        """Apply one optimiser step's statistics, summed over ranks, and clear the pending ones.

        ``reduced`` has the layout of :meth:`pending`; raises ValueError, and changes nothing, when it has not.
        """
        statistics = self.named_statistics(reduced)
        self.update(statistics)
        if self.replace_after and bool(statistics["usage"].any()):
            self.idle_steps.add_(1).masked_fill_(statistics["usage"] > 0, 0)
        self.updates.add_(1)
        self.discard_pending()

    def discard_pending(self) -> None:
        """Forget the statistics since the last step."""
        self._pending.clear()

    # -- inside ----------------------------------------------------------------------------------------------------

    def real_latents(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """The real tokens of ``z``, projected and prepared for comparison with codes: fp32
        ``(tokens, codebook_dim)``, or ``input_dim`` where a kind has one of its own."""
        if not z.is_floating_point():
            raise ValueError(f"latents have dtype {z.dtype}: use a floating point dtype")
        if z.shape[-1:] != (self.input_dim,):
            raise ValueError(
                f"latents have shape {tuple(z.shape)}: the last axis must be {self.input_dim}, what this quantizer "
                "was built for"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != z.shape[:-1]):
            raise ValueError(
                f"mask is {mask.dtype} of shape {tuple(mask.shape)}: use torch.bool of shape {tuple(z.shape[:-1])}"
            )
        latents = (z.reshape(-1, self.input_dim) if mask is None else z[mask]).float()
        # One pass over the latents where all is well: their sum is finite then, unless it overflows.
        if not torch.isfinite(latents.detach().sum()):
            self._refuse_infinite(latents)
        return self.prepare(latents if self.project_in is None else self.project_in(latents))

    def _refuse_infinite(self, latents: Tensor) -> None:
        bad = int((~torch.isfinite(latents)).any(dim=-1).sum())
        if bad:
            raise InfiniteLatents(
                f"{self.name}, step {int(self.updates)}: {bad} of {latents.shape[0]} latents hold NaN or infinity: "
                "look for the layer that made them, or mask these tokens"
            )

    def split_groups(self, latents: Tensor) -> Tensor:
        """``(tokens, codebook_dim)`` → ``(tokens, groups, code_dim)``: group g holds the channels g·code_dim … ."""
        return latents.reshape(-1, self.groups, self.code_dim)

    def join_groups(self, vectors: Tensor) -> Tensor:
        """The vector that codes' vectors make up: ``(..., groups, code_dim)`` → ``(..., codebook_dim)``."""
        return vectors.flatten(start_dim=-2)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        """Let state follow to another device but never to another dtype (design rule 5): steps of a moving average
        round to nothing in bf16, and counts overflow in fp16."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[arg-type]


def count_codes(codes: Tensor, number: int) -> Tensor:
    """How often each code occurs: ``(tokens, groups)`` int64 → fp32 ``(groups, number)``."""
    groups = codes.shape[1]
    if not number:
        return torch.zeros(groups, 0, device=codes.device)
    places = codes + torch.arange(groups, device=codes.device) * number  # group g's codes start at g · number
    return torch.bincount(places.reshape(-1), minlength=groups * number).float().reshape(groups, number)


def sum_by_code(latents: Tensor, codes: Tensor, number: int) -> Tensor:
    """Sum of the latents of each code.

    latents ``(tokens, groups, code_dim)``, codes ``(tokens, groups)`` → ``(groups, number, code_dim)``.
    """
    sums = latents.new_zeros(latents.shape[1], number, latents.shape[2])
    add_by_code(sums, latents, codes)
    return sums


def add_by_code(sums: Tensor, latents: Tensor, codes: Tensor) -> None:
    """Add latents ``(tokens, groups, code_dim)`` to the sums of their codes, ``(groups, number, code_dim)``."""
    groups, number, code_dim = sums.shape
    places = codes + torch.arange(groups, device=codes.device) * number  # group g's codes start at g · number
    sums.view(-1, code_dim).index_add_(0, places.reshape(-1), latents.reshape(-1, code_dim))


def look_up(codebook: Tensor, codes: Tensor) -> Tensor:
    """Codes' vectors, differentiable in the codebook.

    codebook ``(groups, codes, code_dim)``, codes ``(tokens, groups)`` → ``(tokens, groups, code_dim)``.
    """
    groups, number, code_dim = codebook.shape
    places = codes + torch.arange(groups, device=codes.device) * number
    rows = codebook.reshape(groups * number, code_dim).index_select(0, places.reshape(-1))
    return rows.reshape(-1, groups, code_dim)


def straight_through(latents: Tensor, vectors: Tensor) -> Tensor:
    """The value of ``vectors`` bit for bit, with the gradient passed to ``latents`` unchanged."""
    return vectors.detach() + (latents - latents.detach())


def mean_square(difference: Tensor) -> Tensor:
    """Mean over tokens and features; 0 with its graph intact for no tokens."""
    return difference.square().sum() / max(1, difference.numel())


def _scatter(rows: Tensor, mask: Tensor | None, shape: torch.Size, fill: int) -> Tensor:
    """Put the real tokens' ``rows (tokens, n)`` back into place: ``(*shape, n)``, ``fill`` elsewhere."""
    if mask is None:
        return rows.reshape(*shape, rows.shape[-1])
    places = mask.unsqueeze(-1).expand(*shape, rows.shape[-1])
    return torch.full(places.shape, fill, dtype=rows.dtype, device=rows.device).masked_scatter(places, rows)
