"""A keyed hash of a token's place in the global batch: chance that does not depend on the number of ranks (rule 6).

In: integers. Out: integers that look random. Pure functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 0xFFFF_FFFF_FFFF_FFFF


def token_keys(tokens: int, *place: int, device: torch.device | str = "cpu") -> Tensor:
    """One key for each token of a micro-batch: int64 ``(tokens,)``, not negative.

    ``place`` says which micro-batch, for example (purpose, step, number): equal places give equal keys. The hash is
    splitmix64 (Steele, Lea, Flood, OOPSLA 2014), applied to one integer after another.
    """
    state = 0
    for part in place:
        state = _mix((state + part + _GOLDEN) & _WORD)
    keys = torch.arange(1, tokens + 1, device=device) * _signed(_GOLDEN) + _signed(state)
    keys = (keys ^ _shift(keys, 30)) * _signed(_FIRST)
    keys = (keys ^ _shift(keys, 27)) * _signed(_SECOND)
    return (keys ^ _shift(keys, 31)) & 0x7FFF_FFFF_FFFF_FFFF


def _mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def _shift(words: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
