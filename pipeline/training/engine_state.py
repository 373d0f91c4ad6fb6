"""What a training engine holds, as stretches of named tensors: one form for every ZeRO stage and number of ranks.

In: a DeepSpeed engine. Out: this rank's pieces, which over all ranks cover every weight and every moment of the
optimiser exactly once; or, the other way round, an engine filled from such pieces. May touch: the engine's weights,
buffers and optimiser state.

DeepSpeed's own checkpoints mirror the layout that wrote them: plain ones load on the same ranks only, and universal
ones need a conversion, which ZeRO 0 does not have. A piece knows where in the whole tensor it lies, so that any layout
reads what any other wrote, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from pipeline import collectives
from pipeline.codebooks.engine_parameters import gathered

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHT = "weight"
AVERAGE = "average"  # of a weight, kept beside the engine (pipeline.training.average)
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # Adam's and SGD's, under torch's names
GATHERED_AT_ONCE = 2**27
"""Elements of weights that ZeRO 3 gathers at one time while they are loaded: 512 MB."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter's flattened weight or moment."""

    name: str
    part: str
    """:data:`WEIGHT`, :data:`AVERAGE` or one of :data:`MOMENTS`."""
    start: int
    values: Tensor
    """fp32 ``(n,)``, elements ``start … start + n``: the engine's own memory."""


class Source(Protocol):
    """What :func:`load_state` reads from."""

    def read(self, name: str, part: str, start: int, numel: int) -> Tensor | None:
        """Elements ``start … start + numel`` of a flattened weight or moment, fp32 on the CPU; None if it has none."""


@dataclass(frozen=True)
class _Stretch:
    """Where a rank keeps a stretch of a parameter, and of what the optimiser knows about it."""

    start: int  # in the flattened parameter
    owner: Tensor  # a flat tensor with room for several parameters, or the parameter: the optimiser's state is by it
    offset: int  # in the flattened owner
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This stretch of a tensor laid out as the owner is."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def owned_pieces(engine: DeepSpeedEngine) -> Iterator[Piece]:
    """The pieces that this rank is to save, between two steps."""
    rank, ranks = collectives.rank(), collectives.world_size()
    state = _optimizer(engine).state
    for name, parameter in engine.module.named_parameters():
        stretch = _stretch(engine, parameter)
        if stretch is None:
            continue
        if stretch.owner is parameter:  # every rank holds all of it, and saves its share
            first, end = (stretch.numel * place // ranks for place in (rank, rank + 1))
            stretch = _Stretch(first, parameter, first, end - first)
        if stretch.numel:
            yield Piece(name, WEIGHT, stretch.start, stretch.of(stretch.owner))
            for moment in MOMENTS:
                if state.get(stretch.owner, {}).get(moment) is not None:
                    yield Piece(name, moment, stretch.start, stretch.of(state[stretch.owner][moment]))


def optimizer_steps(engine: DeepSpeedEngine) -> dict[str, float]:
    """The steps that the optimiser has made for each parameter of which this rank keeps state.

    Fewer than the run's where steps were skipped and, under ZeRO 0, where a parameter had no gradient.
    """
    state = _optimizer(engine).state
    steps = {}
    for name, parameter in engine.module.named_parameters():
        stretch = _stretch(engine, parameter)
        if stretch is not None and "step" in state.get(stretch.owner, {}):
            steps[name] = float(state[stretch.owner]["step"])
    return steps


def buffers(module: nn.Module) -> dict[str, Tensor]:
    """What a state dict holds beside parameters: codebook state, whole on every rank."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in module.state_dict().items() if name not in parameters}


def parameter_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Whole shapes, of partitioned parameters too."""
    return {name: list(getattr(found, "ds_shape", found.shape)) for name, found in module.named_parameters()}


@torch.no_grad()
def load_state(
    engine: DeepSpeedEngine, source: Source, saved_buffers: Mapping[str, Tensor], steps: Mapping[str, float]
) -> None:
    """Fill the engine, before its first step. ``steps`` are :func:`optimizer_steps` of all ranks that saved. Called by
    every rank."""
    engine.module.load_state_dict(dict(saved_buffers), strict=False)
    _load_weights(engine.module, source)
    state = _optimizer(engine).state
    sgd = isinstance(_optimizer(engine), torch.optim.SGD)  # which counts no steps
    for name, parameter in engine.module.named_parameters():
        stretch = _stretch(engine, parameter)
        if stretch is None or not parameter.requires_grad:
            continue
        flat = stretch.owner is not parameter
        if flat:  # the engine's fp32 copy
            stretch.of(stretch.owner).copy_(_need(source, name, stretch.start, stretch.numel))
        elif not sgd and name not in steps:
            continue  # the optimiser begins a parameter's state with its first gradient
        entry = state[stretch.owner]
        if not sgd:
            entry.setdefault("step", torch.tensor(0.0)).fill_(max(steps.values(), default=0.0) if flat else steps[name])
        for moment in MOMENTS[-1:] if sgd else MOMENTS[:-1]:
            values = source.read(name, moment, stretch.start, stretch.numel)
            if values is not None or not sgd:
                room = entry.setdefault(moment, torch.zeros_like(stretch.owner))
            if values is not None:
                stretch.of(room).copy_(values)


def _load_weights(module: nn.Module, source: Source) -> None:
    """Every rank its own copy; of partitioned weights rank 0 reads the whole and the engine deals them out."""
    for batch in _batches(module):
        partitioned = any(hasattr(parameter, "ds_id") for _, parameter in batch)
        with gathered([parameter for _, parameter in batch]):
            for name, parameter in batch:
                if not partitioned or collectives.rank() == 0:
                    parameter.view(-1).copy_(_need(source, name, 0, parameter.numel()))


def _batches(module: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    batch: list[tuple[str, nn.Parameter]] = []
    size = 0
    for name, parameter in module.named_parameters():
        batch.append((name, parameter))
        size += int(getattr(parameter, "ds_numel", parameter.numel()))
        if size >= GATHERED_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _need(source: Source, name: str, start: int, numel: int) -> Tensor:
    values = source.read(name, WEIGHT, start, numel)
    assert values is not None, name  # shapes were compared before
    return values


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    """torch's own optimiser, around which ZeRO puts one of its own."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _stretch(engine: Any, parameter: Any) -> _Stretch | None:
    """Where this rank keeps what it alone is in charge of, or all of a parameter that every rank holds; None if it
    keeps nothing of it."""
    if hasattr(parameter, "ds_id"):  # ZeRO 3: each rank has an equal part, the last one's is filled up
        if parameter.requires_grad:
            zero = engine.optimizer
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            owner = zero.fp32_partitioned_groups_flat[group]
        else:
            owner, offset, size = parameter.ds_tensor, 0, parameter.ds_tensor.numel()
        start = collectives.rank() * int(size)
        numel = min(int(size), parameter.ds_numel - start)
        return _Stretch(start, owner, int(offset), numel) if numel > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2: parameters in a row, cut into equal parts
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        owner = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return _Stretch(int(here.start), owner, int(there.start), int(here.numel))
    return _Stretch(0, parameter, 0, parameter.numel())
