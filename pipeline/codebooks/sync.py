"""One all-reduce an optimiser step for all codebooks of a model (design rules 4 and 6).

In: a model whose quantizers hold pending statistics. Out: updated codebooks, the same on every rank, and their health.
May touch: the codebooks.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import collectives
from pipeline.codebooks.engine_parameters import check_precision, write_codes
from pipeline.codebooks.health import CodebookHealth, measure_usage
from pipeline.codebooks.replacement import Replacement
from pipeline.quantizers.base import Quantizer


class CodebookSync:
    """Finds every quantizer of ``model``, by its name in the model; a quantizer that is used twice counts once.

    Every rank makes it and starts with rank 0's codebooks. ``optimizer`` is the plain torch optimiser of learned codes,
    if there is one, whose moments of replaced codes are forgotten; DeepSpeed's is found from the parameters.

    Raises RuntimeError on every rank when the ranks' models differ in their quantizers.
    """

    def __init__(
        self, model: nn.Module, process_group: Any = None, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self.process_group = process_group
        self.quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}
        layout = "; ".join(
            f"{name}: {module.config.kind} {[tuple(tensor.shape) for tensor in module.pending()]}"
            for name, module in self.quantizers.items()
        )
        collectives.check_same(layout, "the models' quantizers", process_group)
        self.optimizer = optimizer
        for name, quantizer in self.quantizers.items():
            quantizer.name = name or "quantizer"
            quantizer.process_group = process_group
            for tensor in quantizer.state_dict().values():
                collectives.broadcast(tensor, 0, process_group)
        self.replacement = Replacement(self.quantizers, process_group, optimizer)
        self._flat = torch.empty(0)  # where pending statistics lie, one after the other
        self._parts: dict[str, list[Tensor]] = {name: [] for name in self.quantizers}  # of it, by quantizer

    @torch.no_grad()
    def step(self) -> CodebookHealth:
        """Reduce the pending statistics of all quantizers in one all-reduce and let each apply its update.

        Called by every rank once an optimiser step, after the optimiser's own step. A step in which codes are replaced
        needs one collective more. Raises RuntimeError when an engine has cast codebook state below fp32.
        """
        for quantizer in self.quantizers.values():
            check_precision(quantizer)
        reduced = self._reduce_pending()
        for name, quantizer in self.quantizers.items():
            moved = quantizer.moved_codes(quantizer.named_statistics(reduced[name]))
            if moved is not None:
                write_codes(quantizer, moved[0], partial(quantizer.replace_codes, *moved), self.optimizer, forget=False)
            quantizer.apply_update(reduced[name])
        replaced = self.replacement.step()
        return CodebookHealth(
            [
                measure_usage(name or "quantizer", reduced[name][0], replaced.get(name, 0))  # the first is the usage
                for name in self.quantizers
                if reduced[name]  # a quantizer may have no codes, or leave them to quantizers within
            ]
        )

    def _reduce_pending(self) -> dict[str, list[Tensor]]:
        """Every quantizer's pending statistics, summed over ranks in one all-reduce; nothing is copied for it, unless a
        quantizer has moved to another device or another object like this one has taken them. The next forward overwrites
        what this gives."""
        pending = {name: quantizer.pending() for name, quantizer in self.quantizers.items()}
        places = {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in pending.items()}
        if places != {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in self._parts.items()}:
            everything = [tensor for tensors in pending.values() for tensor in tensors]
            self._flat = torch.empty(sum(tensor.numel() for tensor in everything), device=everything[0].device)
            parts = iter(self._flat.split([tensor.numel() for tensor in everything]))
            for name, tensors in pending.items():
                self._parts[name] = [next(parts).view(tensor.shape) for tensor in tensors]
                self.quantizers[name].keep_pending_in(self._parts[name])
        if self._flat.numel():
            collectives.all_reduce_sum(self._flat, self.process_group)
        return self._parts

    def checksum(self) -> str:
        """64 bits of sha256 over every quantizer's state dict, in hexadecimal."""
        digest = hashlib.sha256()
        for name, quantizer in self.quantizers.items():
            for key, tensor in quantizer.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(_bytes(tensor))
        return digest.hexdigest()[:16]

    def check_ranks_agree(self) -> None:
        """Raise RuntimeError on every rank unless all ranks hold bit-equal codebooks."""
        collectives.check_same(self.checksum(), "codebook checksums", self.process_group)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
