"""Tensors of tokens × codes, worked on a few tokens at a time, and the noise that quantizers add to them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 24}
"""Logits that are worked on at once: 8 MB of fp32 on a CPU, what its cache holds; more on a GPU."""
SHARES = 3
"""A tile is at most the 3rd part of all tokens × codes, so that two of them are less than one whole tensor."""


class Tiles:
    """Rows of tokens, and for each as many scratch tiles ``(rows, codes)`` as asked for, always the same memory, of the
    dtype and on the device of ``like``."""

    def __init__(self, like: Tensor, tokens: int, codes: int, number: int) -> None:
        self.tokens = tokens
        elements = TILE_ELEMENTS.get(like.device.type, TILE_ELEMENTS["cuda"])
        self.rows = max(1, min(elements // codes, -(-tokens // SHARES)))
        self._scratch = [like.new_empty(self.rows, codes) for _ in range(number)]

    def __iter__(self) -> Iterator[tuple[slice, list[Tensor]]]:
        for start in range(0, self.tokens, self.rows):
            rows = slice(start, min(start + self.rows, self.tokens))
            yield rows, [tile[: rows.stop - rows.start] for tile in self._scratch]


def gumbel_noise(out: Tensor) -> Tensor:
    """Fills ``out`` with standard Gumbel noise from torch's generator, and returns it.

    −log(−log u) of uniform numbers u: torch's own exponentials take seven times as long to draw on a CPU. A u of 0 is
    taken for the half of the smallest step between them.
    """
    return out.uniform_().clamp_(min=2.0**-25).log_().neg_().log_().neg_()
