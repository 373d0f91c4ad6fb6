"""The nearest code of each latent, without ever holding tokens × codes distances.

In: latents and codebooks in fp32. Out: codes. Pure functions; no state but scratch memory.

Products run in tiles that stay in cache, so the search costs little more than the matrix product itself. Rows are
padded to full blocks, so that a token's code does not depend on how many tokens came with it: matrix libraries choose
another summation order for a handful of rows, and ranks would disagree with a single process on near ties.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

TILE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Distances held at once: 4 MB of fp32 on a CPU, what its cache holds; more on a GPU, where a launch is what costs."""
TILE_DIM = 128
"""Longer vectors get proportionally larger tiles, 4 times at most: each product packs all codes anew."""
BLOCK = 64
"""Fewest rows of a product, and columns that one step of the argmin compares where it goes by blocks."""
FEW_THREADS = 4
"""Up to here NumPy's argmax on one thread beats torch's passes on all."""
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
        found.append(highest_scores(latents[:, group], centred, -centred.square().sum(dim=1) / 2, centre))
    return torch.stack(found, dim=1)


@torch.no_grad()
def highest_scores(latents: Tensor, weights: Tensor, bias: Tensor, centre: Tensor | None = None) -> Tensor:
    """The code with the highest score (z − m)·w + b of each latent; of equal ones the first.

    latents ``(tokens, dim)``, weights ``(codes, dim)``, bias ``(codes,)``, m = centre ``(dim,)`` or none for 0 →
    int64 ``(tokens,)``.
    """
    tokens, codes = latents.shape[0], weights.shape[0]
    found = torch.empty(tokens, dtype=torch.int64, device=latents.device)
    if not tokens:
        return found
    dim = weights.shape[1]
    elements = TILE_ELEMENTS.get(latents.device.type, TILE_ELEMENTS["cuda"]) * min(max(dim // TILE_DIM, 1), 4)
    columns = min(-(-codes // BLOCK) * BLOCK, elements // BLOCK)
    rows = min(max(elements // columns // BLOCK, 1), -(-tokens // BLOCK)) * BLOCK
    padding = -codes % columns  # columns of full width; codes of padding can't win
    if padding:
        weights = torch.cat([weights, weights.new_zeros(padding, dim)])
        bias = torch.cat([bias, bias.new_full((padding,), -torch.inf)])
    tile = _scratch_memory(rows * columns, latents.device).view(rows, columns)
    part = weights.new_zeros(rows, dim)
    for start in range(0, tokens, rows):
        real = min(rows, tokens - start)
        if centre is None:
            part[:real] = latents[start : start + real]
        else:
            torch.sub(latents[start : start + real], centre, out=part[:real])
        padded = -(-real // BLOCK) * BLOCK
        part[real:padded] = 0
        found[start : start + real] = _best_of_rows(part[:padded], weights, bias, tile[:padded])[:real]
    return found


def highest_scores_by_group(latents: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    """:func:`highest_scores` of each group: latents ``(tokens, groups, dim)``, weights ``(groups, codes, dim)``, bias
    ``(groups, codes)`` → int64 ``(tokens, groups)``."""
    return torch.stack([highest_scores(latents[:, g], weights[g], bias[g]) for g in range(len(weights))], dim=1)


def _best_of_rows(part: Tensor, weights: Tensor, bias: Tensor, tile: Tensor) -> Tensor:
    columns = tile.shape[1]
    winners = first_maximum(torch.addmm(bias[:columns], part, weights[:columns].T, out=tile))
    if len(weights) == columns:
        return winners
    best = tile.gather(1, winners.unsqueeze(1)).squeeze(1)
    for first in range(columns, len(weights), columns):
        block = slice(first, first + columns)
        places = first_maximum(torch.addmm(bias[block], part, weights[block].T, out=tile))
        highest = tile.gather(1, places.unsqueeze(1)).squeeze(1)
        better = highest > best  # strictly: of equally good codes the first stays
        best, winners = torch.where(better, highest, best), torch.where(better, places + first, winners)
    return winners


def first_maximum(scores: Tensor) -> Tensor:
    """The first place of each row's highest score: ``(rows, columns)`` without grad → int64 ``(rows,)``.

    torch's own argmax is not vectorised on a CPU and would cost half as much as the product that made the scores.
    NumPy's is; with many threads torch's maximum, which is vectorised too, finds the block that holds it sooner.
    """
    if scores.device.type == "cpu" and torch.get_num_threads() <= FEW_THREADS:
        return torch.from_numpy(scores.numpy().argmax(axis=1))
    if scores.shape[1] % BLOCK:
        return scores.argmax(dim=1)
    blocks = scores.view(scores.shape[0], -1, BLOCK)
    block = blocks.amax(dim=2).argmax(dim=1)
    chosen = blocks[torch.arange(len(block), device=block.device), block]
    return block * BLOCK + chosen.argmax(dim=1)


_kept = threading.local()


def _scratch_memory(elements: int, device: torch.device) -> Tensor:
    """fp32 memory for one search. A GPU's allocator keeps what it gave; a CPU's gives it back to the system, and each
    page that comes anew costs more than the scores on it: a thread keeps its own."""
    if device.type != "cpu":
        return torch.empty(elements, device=device)
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):  # else nothing could write to it outside of that mode
            memory = _kept.memory = torch.empty(elements)
    return memory[:elements]
