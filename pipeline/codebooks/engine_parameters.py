"""Writing single codes of a learned codebook between two steps of an optimiser.

In: a quantizer, which codes, and a function that writes them. Out: the codes written wherever they are kept: in the
parameter, in the engine's fp32 master copy, which would otherwise overwrite them in its next step, and out of the
optimiser's moments, which would otherwise carry on where the dead codes went. May touch: those.

DeepSpeed keeps master copies under ZeRO 1, 2 and 3, and under ZeRO 3 no rank holds a whole parameter between forwards.
Its own bf16 mode keeps them under ZeRO 0 too, where nothing leads from a parameter to its copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import collectives
from pipeline.quantizers.base import Quantizer

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


@torch.no_grad()
def write_codes(
    quantizer: Quantizer,
    chosen: Tensor,
    write: Callable[[], None],
    optimizer: torch.optim.Optimizer | None = None,
    *,
    forget: bool = True,
) -> None:
    """Call ``write``, which changes the codes of ``chosen``, bool ``(groups, codes)``, in the quantizer's own state,
    and carry the change to where an engine keeps copies. Called by every rank with the same values.

    ``forget``: whether the optimiser's moments of these codes become zero. ``optimizer`` is needed for a plain torch
    optimiser's moments only; an engine's are found from the parameters.

    Raises RuntimeError, and changes no code, for codes of a lower precision whose fp32 copy can't be found.
    """
    for name, parameter in quantizer.named_parameters():
        by_code = parameter.shape[:2] == chosen.shape
        if by_code and parameter.element_size() < 4 and not _has_master(parameter):
            raise RuntimeError(
                f"{quantizer.name}.{name} is {parameter.dtype} and its fp32 copy in the optimiser can't be found: use "
                "torch_autocast instead of DeepSpeed's own bf16 or fp16 mode, or ZeRO 1, 2 or 3"
            )
    with gathered(list(quantizer.parameters())):
        write()
        written = [(parameter, parameter.detach().float().clone()) for parameter in quantizer.parameters()]
    for parameter, value in written:
        if value.dim() != 3 or value.shape[:2] != chosen.shape:
            continue  # not a parameter by code
        rows = chosen.unsqueeze(-1).expand(value.shape)
        if hasattr(parameter, "_z3_optimizer"):
            _write_partition(parameter, rows, value, forget)
        elif hasattr(parameter, "_hp_mapping"):
            _write_fragment(parameter, rows, value, forget)
        elif optimizer is not None and forget:
            for name, moment in optimizer.state.get(parameter, {}).items():
                if name in MOMENTS:
                    moment[chosen] = 0


def check_precision(quantizer: Quantizer) -> None:
    """Raise RuntimeError if an engine has cast buffers of ``quantizer`` below fp32: their digits are gone."""
    for key, buffer in quantizer.named_buffers():
        if buffer.is_floating_point() and buffer.element_size() < 4:
            raise RuntimeError(
                f"{quantizer.name}.{key} is {buffer.dtype}: codebook state must stay fp32; leave "
                "data_types.buffer_dtype out of DeepSpeed's settings, or keep_in_fp32_modules at 'auto'"
            )


def _has_master(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block every rank holds whole parameters, of which rank 0's are kept; nothing changes where an engine
    leaves them whole."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(parameters, modifier_rank=0):
        yield


def _write_fragment(parameter: Any, rows: Tensor, value: Tensor, forget: bool) -> None:
    """ZeRO 1 and 2: this rank keeps a stretch of the flat parameter in fp32, or nothing of it.

    Only the chosen codes are written: the others would lose the digits that the engine's precision lacks.
    """
    mapping = parameter._hp_mapping
    if mapping is None:
        return
    address = mapping.lp_fragment_address
    here = rows.reshape(-1)[address.start : address.start + address.numel]
    new = value.reshape(-1)[address.start : address.start + address.numel]
    mapping.get_hp_fragment()[here] = new[here]
    for name in MOMENTS if forget else ():
        if name in (mapping.optim_fragment or {}):
            mapping.get_hp_fragment(name)[here] = 0


def _write_partition(parameter: Any, rows: Tensor, value: Tensor, forget: bool) -> None:
    """ZeRO 3: every rank keeps an equal part of the flat parameter in fp32, the last one's filled up."""
    from deepspeed.utils import (
        safe_get_local_fp32_param,
        safe_get_local_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    master = safe_get_local_fp32_param(parameter)
    start = collectives.rank() * master.numel()
    flat_rows, flat_value = rows.reshape(-1)[start : start + master.numel()], value.reshape(-1)[start:]
    here = torch.zeros_like(master, dtype=torch.bool)
    here[: len(flat_rows)] = flat_rows
    new = master.clone()
    new[here] = flat_value[: len(flat_rows)][flat_rows]
    safe_set_local_fp32_param(parameter, new)
    known = {name for state in parameter._z3_optimizer.optimizer.state.values() for name in state}
    for name in MOMENTS if forget else ():
        if name in known:
            moment = safe_get_local_optimizer_state(parameter, name).clone()
            moment[here] = 0
            safe_set_local_optimizer_state(parameter, moment, name)
