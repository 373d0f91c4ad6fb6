"""The nearest code of each latent, by squared Euclidean distance, without ever holding tokens × codes distances.

In: latents and codebooks in fp32. Out: codes. Pure functions; no state.

Rows are padded to full blocks, so that a token's code does not depend on how many tokens came with it: matrix libraries
choose another summation order for a handful of rows, and ranks would disagree with a single process on near ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_ELEMENTS = 2_097_152  # distances held at once: 8 MB of fp32, which stays in cache
ROW_BLOCK = 64  # fewest rows of a product
CENTRE_CODES = 256  # codes that the centre is taken from, at most


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """The code nearest to each latent in each group; of equally near ones the first.

    latents ``(tokens, groups, code_dim)``, codebook ``(groups, codes, code_dim)`` → int64 ``(tokens, groups)``.

    |z|² is the same for all codes of a row and plays no part, which leaves |c|²/2 − z·c. Both sides are first moved by
    a centre of the codebook: far from the origin the two terms are large, nearly equal, and fp32 loses the difference.
    The centre is a median, which single codes that have run away do not move.
    """
    groups = [_nearest(latents[:, group], codebook[group]) for group in range(codebook.shape[0])]
    return torch.stack(groups, dim=1)


def _nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """latents ``(tokens, dim)``, codebook ``(codes, dim)`` → int64 ``(tokens,)``."""
    latents, codebook = latents.detach().float(), codebook.detach().float()
    tokens, codes = latents.shape[0], codebook.shape[0]
    centre = codebook[:: -(-codes // CENTRE_CODES)].median(dim=0).values
    centred = codebook - centre
    half_lengths = centred.square().sum(dim=1) / 2
    columns = min(codes, TILE_ELEMENTS // ROW_BLOCK)
    rows = max(ROW_BLOCK, TILE_ELEMENTS // columns // ROW_BLOCK * ROW_BLOCK)

    found = torch.empty(tokens, dtype=torch.int64, device=latents.device)
    for start in range(0, tokens, rows):
        part = latents[start : start + rows] - centre
        real = part.shape[0]
        missing = -real % ROW_BLOCK
        if missing:
            part = torch.cat([part, part.new_zeros(missing, part.shape[1])])
        found[start : start + real] = _nearest_of_rows(part, centred, half_lengths, columns)[:real]
    return found


def _nearest_of_rows(part: Tensor, centred: Tensor, half_lengths: Tensor, columns: int) -> Tensor:
    best: Tensor | None = None
    winners: Tensor | None = None
    for first in range(0, centred.shape[0], columns):
        block = slice(first, first + columns)
        distances = torch.addmm(half_lengths[block], part, centred[block].T, alpha=-1)
        least, places = distances.min(dim=1)
        if best is None or winners is None:
            best, winners = least, places
        else:
            # strictly less: of equally near codes the first stays
            closer = least < best
            best, winners = torch.where(closer, least, best), torch.where(closer, places + first, winners)
    assert winners is not None
    return winners
