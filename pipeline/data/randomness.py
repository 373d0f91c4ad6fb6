"""Randomness that belongs to the sample (design rule 2).

In: (seed, epoch, index, stream, source). Out: a NumPy generator whose numbers depend on nothing else: not on the rank,
the thread, the number of ranks or what was drawn before. Philox is counter-based, so any of the generators is made in
constant time.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np

_WORD = (1 << 64) - 1


@lru_cache(maxsize=64)
def _stream_word(stream: str) -> int:
    return int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")


def sample_generator(seed: int, epoch: int, index: int, stream: str, source: int = 0) -> np.random.Generator:
    """The generator of sample ``index`` in ``epoch`` for one purpose, e.g. ``"crop"``; ``source`` tells apart the data
    sets of a mixture.

    Philox-4x64 (Salmon et al. 2011): the key holds the seed and the stream, the upper counter words the source, the
    epoch and the index; the lowest word counts the blocks drawn, so two generators never overlap before 2⁶⁴ blocks.
    """
    counter = np.array([0, source & _WORD, epoch & _WORD, index & _WORD], dtype=np.uint64)
    key = np.array([seed & _WORD, _stream_word(stream)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(_Key(key), counter=counter))  # type: ignore[arg-type]  # stubs lack it


class _Key(np.random.bit_generator.ISeedSequence):
    """Hands Philox its key. Its own ``key=`` would do, but first asks the operating system for entropy that nobody
    uses, which takes longer than all the rest.
    """

    def __init__(self, key: np.ndarray) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self.key
