"""Several data sets as one: which of them each micro-batch of the endless sequence belongs to.

In: data sets and weights, or the number of a micro-batch. Out: the data set whose turn it is, and how many turns it had
before. Pure but for opening data sets. The turns are a fixed pattern that repeats, so a data set's own cursor is a
closed function of the micro-batch's number and nothing needs to be remembered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.data.cache import ShardCache
from pipeline.data.config import MIX_TURNS, DataConfig
from pipeline.data.dataset import OPEN_INDEXES, ShardedDataset


class Mixture:
    """Data sets of one kind, read side by side; a sample is named by ``(source, index)``.

    Raises ``ValueError`` if they are not of one kind, or not as many as the weights.
    """

    def __init__(self, sources: Sequence[ShardedDataset], weights: Sequence[float]) -> None:
        for source in sources:
            if source.kind != sources[0].kind:
                raise ValueError(
                    f"{sources[0].path} holds {sources[0].kind} data and {source.path} {source.kind} data: "
                    "a mixture is of one kind"
                )
        if not sources or len(sources) != len(weights):
            raise ValueError(f"{len(sources)} data sets can't be mixed by {len(weights)} weights: give each one")
        self.sources = tuple(sources)
        self.weights = tuple(weights)
        self.kind = sources[0].kind

    @property
    def path(self) -> str:
        """What messages call it."""
        return ", ".join(str(source.path) for source in self.sources)

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def close(self) -> None:
        """Let go of all indexes and files; reading opens them again."""
        for source in self.sources:
            source.close()


Data = ShardedDataset | Mixture  # either reads a sample by ``sources[reference.source].read(reference.index)``


def open_data(data: DataConfig) -> Data:
    """The data sets that a configuration names. Raises :class:`ManifestError` for one that can't be opened."""
    # A full shuffle comes back to a shard all the time: its index is kept.
    open_indexes = None if data.shuffle == "full" else max(OPEN_INDEXES, 4 * data.window_shards)
    cache = ShardCache(data.cache, data.cache_gigabytes)  # one for all, so that together they keep its bound
    sources = [ShardedDataset(each.path, each.split, open_indexes, cache) for each in data.sources]
    return sources[0] if len(sources) == 1 else Mixture(sources, [each.weight for each in data.sources])


class Turns:
    """Whose turn each micro-batch is: a pattern of :data:`MIX_TURNS` turns, in which each data set has its share."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.shares = deal_shares(weights)  # (sources,) turns of each in a round
        self._pattern = deal_turns(self.shares)
        of_source = self._pattern == np.arange(len(weights))[:, None]  # (sources, turns)
        self._before = np.cumsum(of_source, axis=1) - of_source  # (sources, turns) turns that a source had before

    def place(self, number: int) -> tuple[int, int]:
        """The data set of micro-batch ``number``, and that data set's own number of it."""
        rounds, turn = divmod(number, MIX_TURNS)
        source = int(self._pattern[turn])
        return source, rounds * int(self.shares[source]) + int(self._before[source, turn])

    def reached(self, number: int) -> list[int]:
        """Micro-batches of each data set among the first ``number``."""
        rounds, turn = divmod(number, MIX_TURNS)
        return (rounds * self.shares + self._before[:, turn] if turn else rounds * self.shares).tolist()


def deal_shares(weights: Sequence[float]) -> np.ndarray:
    """Turns of each data set in a round, int64 ``(sources,)``, by largest remainder. Raises ``ValueError`` for a weight
    that gets none.
    """
    exact = np.array(weights, dtype=np.float64) / sum(weights) * MIX_TURNS
    shares = np.floor(exact + 1e-9).astype(np.int64)
    if (shares < 1).any():
        weight = weights[int(np.argmin(shares))]
        raise ValueError(
            f"weight {weight:g} is less than one micro-batch in {MIX_TURNS} of all weights' {sum(weights):g}: "
            f"use {sum(weights) / MIX_TURNS:g} or more"
        )
    missing = MIX_TURNS - int(shares.sum())
    order = np.argsort(shares - exact, kind="stable")  # who is furthest below the exact share comes first
    shares[order[:missing]] += 1
    return shares


def deal_turns(shares: np.ndarray) -> np.ndarray:
    """The pattern of turns, int64 ``(MIX_TURNS,)``: each goes to the data set that is furthest behind its share, the
    first of them if several are. No data set ever gets ahead of its share by more than a turn, so at the end all have
    theirs exactly.
    """
    pattern = np.empty(MIX_TURNS, dtype=np.int64)
    dealt = np.zeros(len(shares), dtype=np.int64)
    for turn in range(MIX_TURNS):
        source = int(np.argmax(shares * (turn + 1) - dealt * MIX_TURNS))
        pattern[turn] = source
        dealt[source] += 1
    return pattern
