"""A sample of latents that does not depend on the number of ranks (design rule 6).

In: latents and the number of their micro-batch in the global batch. Out: those with the smallest keys, a keyed hash of
a token's place, in the order of the keys. Talks to other ranks in ``gather`` only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline import collectives
from pipeline.quantizers.keys import token_keys

NO_KEY = torch.iinfo(torch.int64).max
"""Sorts behind every real key: fills short lists up."""


class LatentSample:
    """Keeps the ``size`` latents with the smallest keys of all that are added; the order of adding plays no part.

    ``purpose`` and what follows it go into every key, so that two samples of the same tokens differ.
    """

    def __init__(self, size: int, *purpose: int) -> None:
        self.size = size
        self.purpose = purpose
        self._keys: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._held = 0

    def add(self, latents: Tensor, number: int) -> None:
        """Add the real latents ``(tokens, dim)`` of micro-batch ``number`` of the global batch."""
        self._keys.append(token_keys(len(latents), *self.purpose, number, device=latents.device))
        self._latents.append(latents.detach().float())
        self._held += len(latents)
        if self._held > 2 * self.size:
            self._shrink()

    def smallest(self, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """This rank's keys int64 ``(n,)``, ascending, and latents fp32 ``(n, dim)``, n at most ``size``."""
        if not self._keys:
            return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dim, device=device)
        self._shrink()
        return self._keys[0], self._latents[0]

    def gather(self, dim: int, device: torch.device, group: Any = None) -> Tensor:
        """The sample over all ranks, by key: fp32 ``(at most size, dim)``, the same on every rank.

        Keys go first, so that only latents that belong to the joint sample travel.
        """
        keys, latents = self.smallest(dim, device)
        longest = int(collectives.all_reduce_max(torch.tensor([len(keys)], device=device), group))
        by_rank = collectives.all_gather(_fill(keys, longest, NO_KEY), group)  # (ranks, longest)
        sample = by_rank.reshape(-1).sort(stable=True).values[: self.size]
        sample = sample[sample < NO_KEY]
        if not len(sample):
            return torch.empty(0, dim, device=device)
        chosen = by_rank <= sample[-1]  # keys ascend: the chosen ones of a rank are its first
        most = int(chosen.sum(dim=1).max())
        vectors = collectives.all_gather(_fill(latents[:most], most, 0), group)  # (ranks, most, dim)
        order = by_rank[:, :most].reshape(-1).sort(stable=True).indices[: len(sample)]
        return vectors.reshape(-1, dim)[order]

    def _shrink(self) -> None:
        keys, order = torch.cat(self._keys).sort(stable=True)
        self._keys, self._latents = [keys[: self.size]], [torch.cat(self._latents)[order[: self.size]]]
        self._held = len(self._keys[0])


def merge(keys: Tensor, latents: Tensor, size: int) -> Tensor:
    """The ``size`` latents with the smallest real keys: ``(n,)``, ``(n, dim)`` → ``(at most size, dim)``."""
    keys, order = keys.sort(stable=True)
    return latents[order[keys < NO_KEY][:size]]


def _fill(rows: Tensor, length: int, value: int) -> Tensor:
    """Rows ``(n, ...)`` filled up to ``(length, ...)``."""
    return torch.cat([rows, rows.new_full((length - len(rows), *rows.shape[1:]), value)])


def pack(keys: Tensor, latents: Tensor, size: int) -> Tensor:
    """The first ``size`` keys and latents as bits, int32 ``(size, 2 + dim)``: for one collective of a known shape."""
    keys, latents = _fill(keys[:size], size, NO_KEY), _fill(latents[:size], size, 0)
    return torch.cat([keys.unsqueeze(1).view(torch.int32), latents.contiguous().view(torch.int32)], dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack`, of any number of rows."""
    keys = packed[:, :2].contiguous().view(torch.int64).squeeze(1)
    return keys, packed[:, 2:].contiguous().view(torch.float32)
