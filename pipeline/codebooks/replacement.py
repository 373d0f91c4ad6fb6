"""Codes that no token has chosen for a while move to where latents are.

In: the latents that quantizers see in training. Out: replaced codes, the same on every rank and on any number of them.
May touch: codebooks, and the optimiser's state of replaced codes.

Huh et al., arXiv 2305.08842, section 4.3 (LRU replacement), counted in optimiser steps over all ranks instead of
forwards of one. Which latents take the dead codes' places is decided by a keyed hash of the token's place in the global
batch: the n-th forward since the last step on rank r of W is micro-batch n·W + r.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline import collectives
from pipeline.codebooks.engine_parameters import write_codes
from pipeline.codebooks.sample import LatentSample, merge, pack, unpack
from pipeline.quantizers.base import InfiniteLatents, Quantizer

PURPOSE = 2  # first part of the tokens' keys here


class Replacement:
    """Watches the quantizers that replace codes, and replaces them in :meth:`step`.

    Latents are kept only in steps in which a code may die, and no more of them than codes may.
    """

    def __init__(
        self, quantizers: Mapping[str, Quantizer], group: Any, optimizer: torch.optim.Optimizer | None
    ) -> None:
        self.quantizers = {name: quantizer for name, quantizer in quantizers.items() if quantizer.replace_after}
        self.group = group
        self.optimizer = optimizer
        self._forwards: dict[str, int] = {}
        self._samples: dict[str, LatentSample] = {}
        for name, quantizer in self.quantizers.items():
            quantizer.register_forward_pre_hook(self._watch(name), with_kwargs=True)

    def _watch(self, name: str) -> Any:
        def look(quantizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not quantizer.records():
                return
            forward = self._forwards.get(name, 0)
            if forward == 0:
                self._samples[name] = LatentSample(_count_at_risk(quantizer), *_key_of(name, quantizer))
            if self._samples[name].size:
                latents = args[0] if args else kwargs["z"]
                mask = args[1] if len(args) > 1 else kwargs.get("mask")
                number = forward * collectives.world_size(self.group) + collectives.rank(self.group)
                with torch.no_grad(), suppress(InfiniteLatents):  # of which the quantizer says what there is to say
                    self._samples[name].add(quantizer.real_latents(latents, mask), number)
            self._forwards[name] = forward + 1

        return look

    def step(self) -> dict[str, int]:
        """Replace the codes that have died in this step; returns how many, by quantizer.

        Called by every rank after the step's statistics were applied: all see the same dead codes. One all-gather for
        all quantizers if there are any, otherwise nothing.
        """
        dead = {name: quantizer.idle_steps >= quantizer.replace_after for name, quantizer in self.quantizers.items()}
        dead = {name: codes for name, codes in dead.items() if bool(codes.any())}
        if dead:
            self._replace(dead)
        self.discard()
        return {name: int(codes.sum()) for name, codes in dead.items()}

    def discard(self) -> None:
        """Forget the latents since the last step."""
        self._samples.clear()
        self._forwards.clear()

    def _replace(self, dead: dict[str, Tensor]) -> None:
        packed = []
        for name, codes in dead.items():
            quantizer = self.quantizers[name]
            sample = self._samples.get(name, LatentSample(0))
            packed.append(pack(*sample.smallest(quantizer.codebook_dim, codes.device), _most_in_a_group(codes)))
        lengths = [rows.numel() for rows in packed]
        gathered = collectives.all_gather(torch.cat([rows.reshape(-1) for rows in packed]), self.group)
        for (name, codes), part in zip(dead.items(), gathered.split(lengths, dim=1), strict=True):
            quantizer = self.quantizers[name]
            latents = merge(*unpack(part.reshape(-1, 2 + quantizer.codebook_dim)), _most_in_a_group(codes))
            if len(latents):  # else nothing was watched: the step began before this object did
                vectors = quantizer.invert(_take_places(name, quantizer, codes, latents))
                write_codes(quantizer, codes, partial(quantizer.replace_codes, codes, vectors), self.optimizer)
                quantizer.idle_steps.masked_fill_(codes, 0)


def _take_places(name: str, quantizer: Quantizer, dead: Tensor, latents: Tensor) -> Tensor:
    """A latent for each dead code: ``(candidates, dim)`` → ``(groups, codes, code_dim)``, zeros for living codes.

    The n-th dead code of a group takes the n-th latent; when there are too few, they repeat, and the noise keeps
    their codes apart.
    """
    turn = (dead.long().cumsum(dim=1) - 1).clamp(min=0) % len(latents)  # (groups, codes)
    split = quantizer.split_groups(latents)  # (candidates, groups, code_dim)
    vectors = torch.stack([split[turn[group], group] for group in range(quantizer.groups)])
    # On the CPU and from a key: the same noise on every rank and device.
    generator = torch.Generator().manual_seed(zlib.crc32(repr(_key_of(name, quantizer)).encode()))
    noise = torch.randn(vectors.shape, generator=generator).to(vectors.device)
    lengths = vectors.norm(dim=-1, keepdim=True)
    vectors = vectors + quantizer.config.replace_noise * lengths * noise
    return vectors * dead.unsqueeze(-1)


def _count_at_risk(quantizer: Quantizer) -> int:
    """Codes of a group, at most, that die if this step does not use them."""
    return _most_in_a_group(quantizer.idle_steps >= quantizer.replace_after - 1)


def _most_in_a_group(codes: Tensor) -> int:
    return int(codes.sum(dim=1).max())


def _key_of(name: str, quantizer: Quantizer) -> tuple[int, ...]:
    return PURPOSE, zlib.crc32(name.encode()), int(quantizer.updates)
