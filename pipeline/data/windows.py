"""The shards of an epoch in windows: what is shuffled together, and so what a rank reads from at a time.

In: how many shards there are, how many a window takes, the seed. Out: the order of each epoch's shards and where its
windows begin. Pure.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pipeline.data.randomness import sample_generator

CACHED_EPOCHS = 3  # a step may straddle two


class ShardWindows:
    """Each epoch permutes the shards anew and takes them in windows of at most ``window_shards``, all about equally
    large.

    Attributes: ``bounds`` int64 ``(windows + 1,)``, the places in an epoch's order where its windows begin.
    """

    def __init__(self, shards: int, window_shards: int, seed: int, source: int) -> None:
        windows = -(-shards // window_shards)
        self.bounds = np.arange(windows + 1) * shards // windows
        self.order = lru_cache(maxsize=CACHED_EPOCHS)(self._draw_order)
        self._key = (shards, seed, source)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def _draw_order(self, epoch: int) -> np.ndarray:
        """The epoch's shards in their order, int64 ``(shards,)``."""
        shards, seed, source = self._key
        return sample_generator(seed, epoch, 0, "shards", source).permutation(shards)

    def shards(self, epoch: int, window: int) -> np.ndarray:
        """The shards of one window, int64 ``(shards of it,)``."""
        return self.order(epoch)[self.bounds[window] : self.bounds[window + 1]]

    def following(self, epoch: int, window: int) -> np.ndarray:
        """The shards of the window after one, which may be the next epoch's first."""
        return self.shards(epoch, window + 1) if window + 1 < len(self) else self.shards(epoch + 1, 0)

    def holding(self, epoch: int, shard: int) -> int:
        """The window that a shard is in."""
        place = int(np.flatnonzero(self.order(epoch) == shard)[0])
        return int(np.searchsorted(self.bounds, place, side="right")) - 1
