"""One all-reduce an optimiser step for all codebooks of a model (design rules 4 and 6).

In: a model whose quantizers hold pending statistics. Out: updated codebooks, the same on every rank, and their health.
May touch: the codebooks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import collectives
from pipeline.codebooks.engine_parameters import check_precision, write_codes
from pipeline.codebooks.health import CodebookHealth, QuantizerHealth, measure
from pipeline.codebooks.replacement import Replacement
from pipeline.codebooks.watch import Watch, Watched, can_watch
from pipeline.quantizers.base import Quantizer


class CodebookSync:
    """Finds every quantizer of ``model``, by its name in the model; a quantizer that is used twice counts once.

    Every rank makes it and starts with rank 0's codebooks. ``optimizer`` is the plain torch optimiser of learned codes,
    if there is one, whose moments of replaced codes are forgotten; DeepSpeed's is found from the parameters.

    Of each quantizer every ``watch_every``-th step is watched, none if it is 0: sums over some latents travel in the
    same all-reduce then, and its health tells more.

    Raises RuntimeError on every rank when the ranks' models differ in their quantizers.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        watch_every: int = 0,
    ) -> None:
        self.process_group = process_group
        self.quantizers = {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}
        layout = f"watch_every={watch_every}; " + "; ".join(
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
        self.watch_every = watch_every
        self._watches: dict[str, Watch] = {}
        if watch_every:
            self._watches = {name: Watch(found) for name, found in self.quantizers.items() if can_watch(found)}
            for name in self._watches:  # a checkpoint brings the number of steps done
                self.quantizers[name].register_load_state_dict_post_hook(lambda *_: self._choose_watched())
        self._choose_watched()

    @torch.no_grad()
    def step(self) -> CodebookHealth:
        """Reduce the pending statistics of all quantizers in one all-reduce and let each apply its update.

        Called by every rank once an optimiser step, after the optimiser's own step. A step in which codes are replaced
        needs one collective more. Raises RuntimeError when an engine has cast codebook state below fp32.
        """
        for quantizer in self.quantizers.values():
            check_precision(quantizer)
        reduced, watched = self._reduce_pending()
        measured = {
            # the first statistic is the usage; a quantizer may have no codes, or leave them to quantizers within
            name: self._measurement(name, next(iter(reduced[name]), None), watched.get(name))
            for name in self.quantizers
        }
        for name, quantizer in self.quantizers.items():
            moved = quantizer.moved_codes(quantizer.named_statistics(reduced[name]))
            if moved is not None:
                write_codes(quantizer, moved[0], partial(quantizer.replace_codes, *moved), self.optimizer, forget=False)
            quantizer.apply_update(reduced[name])
        replaced = self.replacement.step()
        self._choose_watched()

        def health() -> list[QuantizerHealth]:
            found = {name: measurement() for name, measurement in measured.items()}
            return [
                replace(of_quantizer, replaced=replaced.get(name, 0))
                for name, of_quantizer in found.items()
                if of_quantizer is not None
            ]

        return CodebookHealth(health)

    def discard(self) -> CodebookHealth:
        """Forget the statistics since the last step instead, of a step that the optimiser did not make."""
        for quantizer in self.quantizers.values():
            quantizer.discard_pending()
        self.replacement.discard()
        self._choose_watched()
        return CodebookHealth(list)

    def _measurement(
        self, name: str, counts: Tensor | None, watched: Watched | None
    ) -> Callable[[], QuantizerHealth | None]:
        """What gives a quantizer's health. A watched one's is measured here, before its codes move; for another's a
        copy of the counts is enough, and the looking at numbers can wait."""
        measured = partial(measure, name or "quantizer", self.quantizers[name])
        if watched is not None:
            health = measured(counts, watched)
            return lambda: health
        return partial(measured, None if counts is None else counts.clone(), None)

    def _reduce_pending(self) -> tuple[dict[str, list[Tensor]], dict[str, Watched]]:
        """Every quantizer's pending statistics, and the sums of watched ones, summed over ranks in one all-reduce.

        Nothing is copied for it, unless a quantizer is watched or has moved to another device, or another object like
        this one has taken its statistics. The next forward overwrites what this gives.
        """
        pending = {name: quantizer.pending() for name, quantizer in self.quantizers.items()}
        places = {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in pending.items()}
        if places != {name: [tensor.data_ptr() for tensor in tensors] for name, tensors in self._parts.items()}:
            everything = [tensor for tensors in pending.values() for tensor in tensors]
            self._flat = torch.empty(sum(tensor.numel() for tensor in everything), device=everything[0].device)
            parts = iter(self._flat.split([tensor.numel() for tensor in everything]))
            for name, tensors in pending.items():
                self._parts[name] = [next(parts).view(tensor.shape) for tensor in tensors]
                self.quantizers[name].keep_pending_in(self._parts[name])
        watches = {name: watch for name, watch in self._watches.items() if self.quantizers[name].watch is watch}
        sums = [watch.pending() for watch in watches.values()]
        everything = [self._flat.to(sums[0].device), *sums] if sums else [self._flat]
        flat = torch.cat(everything) if sums else self._flat
        if flat.numel():
            collectives.all_reduce_sum(flat, self.process_group)
        reduced, *summed = flat.split([tensor.numel() for tensor in everything])
        if sums:
            self._flat.copy_(reduced)
        return self._parts, {
            name: watch.read(part) for (name, watch), part in zip(watches.items(), summed, strict=True)
        }

    def _choose_watched(self) -> None:
        """Begin to watch the quantizers whose next step is to be watched, and end it for the others."""
        if not self._watches:
            return
        steps = torch.stack([self.quantizers[name].updates for name in self._watches]).tolist()  # one wait for a GPU
        for (name, watch), done in zip(self._watches.items(), steps, strict=True):
            watch.clear()
            self.quantizers[name].watch = None if (done + 1) % self.watch_every else watch

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
