"""The nearest code of each latent, without ever holding tokens × codes distances.

In: latents and codebooks in fp32. Out: codes. Pure functions; no state.

Products run in tiles that stay in cache, so the search costs little more than the matrix product itself. Rows are
padded to full blocks, so that a token's code does not depend on how many tokens came with it: matrix libraries choose
another summation order for a handful of rows, and ranks would disagree with a single process on near ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 26}
"""Distances held at once: 8 MB of fp32 on a CPU, what its cache holds; more on a GPU, where a launch is what costs."""
BLOCK = 64
"""Fewest rows of a product, and columns that one step of the argmin compares."""
CENTRE_CODES = 256
"""Codes that the centre is taken from, at most."""


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """The code nearest to each latent in each group by squared Euclidean distance; of equally near ones the first.

    latents ``(tokens, groups, code_dim)``, codebook ``(groups, codes, code_dim)`` → int64 ``(tokens, groups)``.

    |z|² is the same for all codes of a row and plays no part, which leaves z·c − |c|²/2. Both sides are first moved by
    a centre of the codebook: far from the origin the two terms are large, nearly equal, and fp32 loses the difference.
    The centre is a median, which single codes that have run away do not move.
    """
    found = []
    for group, codes in enumerate(codebook.detach().float()):
        centre = codes[:: -(-len(codes) // CENTRE_CODES)].median(dim=0).values
        centred = codes - centre
        found.append(highest_scores(latents[:, group].float() - centre, centred, -centred.square().sum(dim=1) / 2))
    return torch.stack(found, dim=1)


@torch.no_grad()
def highest_scores(latents: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """The code with the highest score z·w + b of each latent; of equal ones the first.

    latents ``(tokens, dim)``, weights ``(codes, dim)``, bias ``(codes,)`` → int64 ``(tokens,)``.
    """
    tokens, codes = latents.shape[0], weights.shape[0]
    found = torch.empty(tokens, dtype=torch.int64, device=latents.device)
    if not tokens:
        return found
    elements = TILE_ELEMENTS.get(latents.device.type, TILE_ELEMENTS["cuda"])
    columns = min(-(-codes // BLOCK) * BLOCK, elements // BLOCK)
    rows = max(elements // columns // BLOCK, 1) * BLOCK
    padding = -codes % columns  # columns of full width; codes of padding can't win
    weights = torch.cat([weights, weights.new_zeros(padding, weights.shape[1])]).T
    bias = torch.cat([bias, bias.new_full((padding,), -torch.inf)])
    tile = latents.new_empty(min(rows, -(-tokens // BLOCK) * BLOCK), columns)
    for start in range(0, tokens, rows):
        part = latents[start : start + rows]
        real = part.shape[0]
        if real % BLOCK:
            part = torch.cat([part, part.new_zeros(-real % BLOCK, part.shape[1])])
        found[start : start + real] = _best_of_rows(part, weights, bias, tile[: len(part)])[:real]
    return found


def _best_of_rows(part: Tensor, weights: Tensor, bias: Tensor, tile: Tensor) -> Tensor:
    columns = tile.shape[1]
    best: Tensor | None = None
    winners: Tensor | None = None
    for first in range(0, weights.shape[1], columns):
        block = slice(first, first + columns)
        highest, places = _first_maximum(torch.addmm(bias[block], part, weights[:, block], out=tile))
        if best is None or winners is None:
            best, winners = highest, places
        else:
            better = highest > best  # strictly: of equally good codes the first stays
            best, winners = torch.where(better, highest, best), torch.where(better, places + first, winners)
    assert winners is not None
    return winners


def _first_maximum(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Highest score of each row ``(rows, n · BLOCK)`` and its first place: block by block, since a plain maximum
    vectorises on a CPU and an argmax does not."""
    blocks = scores.view(scores.shape[0], -1, BLOCK)
    by_block = blocks.amax(dim=2)
    block = by_block.argmax(dim=1)
    chosen = blocks[torch.arange(len(block), device=block.device), block]
    return by_block.gather(1, block.unsqueeze(1)).squeeze(1), block * BLOCK + chosen.argmax(dim=1)
