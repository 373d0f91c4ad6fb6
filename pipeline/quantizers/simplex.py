"""Mixtures of codes and the regulariser on them in one differentiable function that keeps one tokens × codes tensor.

In: latents, the weights of logits, codes. Out: mixtures p·C, the K-nearest-neighbour loss, hard codes and mean
probabilities. Pure but for the noise that it draws and the ranks that :class:`Neighbourhood` may ask. Autograd would
hold logits, log p, p, distances and the gradient of each; kept here is log p, in which a token far from a code still
has a distance where p is 0. The rest passes through tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline import collectives
from pipeline.quantizers.entropy import Scope
from pipeline.quantizers.search import first_maximum
from pipeline.quantizers.tiles import TILE_ELEMENTS, Tiles, gumbel_noise

Distance = Literal["l2", "cross_entropy"]


class Mixtures(NamedTuple):
    """What :func:`mix` gives."""

    vectors: Tensor
    """``(tokens, groups, code_dim)``: p·C, differentiable."""
    loss: Tensor
    """Scalar: the regulariser without its weight, differentiable; 0 where this rank has no tokens."""
    codes: Tensor
    """``(tokens, groups)`` int64: the likeliest code, of equally likely ones the first."""
    mean: Tensor
    """``(groups, codes)``: p's mean over tokens; zeros when there are none."""
    total: int
    """Tokens that neighbours were looked for among: all ranks' in ``scope=global``."""


@dataclass(frozen=True)
class Neighbourhood:
    """Which tokens each code pulls: the ``neighbours`` nearest ones by ``distance``, 0 for none, in ``scope``; of
    equally near ones the lower rank's, then the earlier. ``group``: the process group of the global scope."""

    neighbours: int
    distance: Distance
    scope: Scope = "micro_batch"
    group: collectives.Group = None


def mix(
    latents: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, neighbourhood: Neighbourhood, noise: float = 0.0
) -> Mixtures:
    """Mixtures p = softmax(logits) of the codes, logits = z·Wᵀ + b, and the regulariser
    ``1/(codes·K) · Σ_m Σ_{i ∈ K nearest to vertex m} D(e_m, p_i)``, a mean over groups, with D(e_m, p) = −log p_m or
    |e_m − p|² (Morita, arXiv 2509.22161).

    latents ``(tokens, groups, dim)``, weight ``(groups, codes, dim)``, bias ``(groups, codes)``, codebook
    ``(groups, codes, code_dim)``, all of one floating dtype. ``noise`` is the factor of Gumbel noise on the logits, 0
    for none. Differentiable once in the four tensors; the choice of neighbours is not differentiated.

    In the global scope the loss has the joint value on every rank that has tokens, and the gradient which, weighted by
    each rank's share of the tokens and summed over ranks, is the joint one. Every rank must call it: one all-gather of
    the K nearest distances of each code.
    """
    vectors, loss, codes, mean, total = _Mix.apply(latents, weight, bias, codebook, neighbourhood, noise)  # type: ignore[no-untyped-call]
    return Mixtures(vectors, loss, codes, mean, total)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: Tensor,
        weight: Tensor,
        bias: Tensor,
        codebook: Tensor,
        neighbourhood: Neighbourhood,
        noise: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        made = _mixtures(latents, weight, bias, codebook, neighbourhood.distance, noise)
        log_mixtures, squares, vectors, codes, mean = made
        loss, total, places, coefficient = _regularise(log_mixtures, squares, neighbourhood)
        ctx.coefficient = coefficient
        ctx.save_for_backward(latents, weight, codebook, log_mixtures, vectors, squares, places)
        ctx.mark_non_differentiable(codes, mean)
        ctx.set_materialize_grads(False)
        return vectors, loss, codes, mean, total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_vectors: Tensor | None, of_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        latents, weight, codebook, log_mixtures, vectors, squares, places = ctx.saved_tensors
        tokens, groups, _ = latents.shape
        number = codebook.shape[1]
        wants = ctx.needs_input_grad
        of_latents = latents.new_empty(latents.shape) if wants[0] else None
        of_weight = torch.zeros_like(weight) if wants[1] else None
        of_bias = weight.new_zeros(groups, number) if wants[2] else None
        of_codebook = torch.zeros_like(codebook) if wants[3] else None
        with torch.autocast(latents.device.type, enabled=False):
            factor = None if of_loss is None or not ctx.coefficient else of_loss * ctx.coefficient
            tiles = Tiles(log_mixtures, tokens, number, 2)
            for group in range(groups):
                pairs = _Pairs(places[group], tokens, number, tiles)
                # Σ_j p_j · ∂L/∂p_j of each token, which softmax's gradient takes off
                inner = latents.new_zeros(tokens)
                if of_vectors is not None:
                    inner += (of_vectors[:, group] * vectors[:, group]).sum(dim=1)
                for turn, (rows, (mixtures, gradient)) in enumerate(tiles):
                    torch.exp(log_mixtures[group, rows], out=mixtures)
                    if of_vectors is None:
                        gradient.zero_()
                    else:
                        upstream = of_vectors[rows, group]
                        torch.mm(upstream, codebook[group].T, out=gradient)
                        if of_codebook is not None:
                            of_codebook[group].addmm_(mixtures.T, upstream)
                    taken, chosen = inner[rows], None
                    if factor is not None:
                        chosen = pairs.of_tile(turn)
                        counts = pairs.counts[rows].to(mixtures.dtype)
                        if squares is None:  # −log p_m: ∂/∂logits = p − e_m
                            taken = taken - factor * counts
                            change = -factor.expand(len(chosen))
                        else:  # 1 − 2p_m + |p|²: ∂/∂p_j = 2p_j − 2[j = m]
                            values = mixtures.view(-1)[chosen]
                            own = torch.zeros_like(taken).index_add_(0, chosen // number, values)
                            taken = taken + 2 * factor * (counts * squares[group, rows] - own)
                            gradient.addcmul_(mixtures, (2 * factor * counts).unsqueeze(1))
                            change = -2 * factor * values
                    gradient.sub_(taken.unsqueeze(1)).mul_(mixtures)
                    if chosen is not None:
                        gradient.view(-1).index_add_(0, chosen, change)
                    if of_latents is not None:
                        of_latents[rows, group] = gradient @ weight[group]
                    if of_weight is not None:
                        of_weight[group].addmm_(gradient.T, latents[rows, group])
                    if of_bias is not None:
                        of_bias[group] += gradient.sum(dim=0)
        return of_latents, of_weight, of_bias, of_codebook, None, None


def _mixtures(
    latents: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, distance: Distance, noise: float
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """log p ``(groups, tokens, codes)``; |p|² ``(groups, tokens)`` where the distance needs it; vectors, codes and mean
    as in :class:`Mixtures`."""
    tokens, groups, _ = latents.shape
    number = codebook.shape[1]
    log_mixtures = latents.new_empty(groups, tokens, number)
    squares = latents.new_empty(groups, tokens) if distance == "l2" else None
    vectors = latents.new_empty(tokens, groups, codebook.shape[2])
    codes = torch.empty(tokens, groups, dtype=torch.int64, device=latents.device)
    mean = latents.new_zeros(groups, number)
    tiles = Tiles(log_mixtures, tokens, number, 2 if noise else 1)
    for group in range(groups):
        for rows, (tile, *spare) in tiles:
            torch.addmm(bias[group], latents[rows, group], weight[group].T, out=tile)
            if noise:
                tile.add_(gumbel_noise(spare[0]), alpha=noise)
            kept = log_mixtures[group, rows]
            torch.log_softmax(tile, dim=-1, out=kept)
            torch.exp(kept, out=tile)
            codes[rows, group] = first_maximum(kept)
            vectors[rows, group] = tile @ codebook[group]
            mean[group] += tile.sum(dim=0)
            if squares is not None:
                squares[group, rows] = torch.linalg.vector_norm(tile, dim=1).square()
    return log_mixtures, squares, vectors, codes, mean / max(1, tokens)


class _Pairs:
    """The pairs of a token and a code that pulls it, by tile. ``places``: token · codes + code, ascending."""

    def __init__(self, places: Tensor, tokens: int, codes: int, tiles: Tiles) -> None:
        self.places, self.step = places, tiles.rows * codes
        self.counts = torch.bincount(places // codes, minlength=tokens + 1)  # the last: pairs of other ranks
        starts = torch.arange(-(-tokens // tiles.rows) + 1, device=places.device) * self.step
        self.bounds = torch.searchsorted(places, starts.clamp(max=tokens * codes)).tolist()

    def of_tile(self, number: int) -> Tensor:
        """Places within the tile, ``(pairs,)``."""
        return self.places[self.bounds[number] : self.bounds[number + 1]] - number * self.step


def _regularise(
    log_mixtures: Tensor, squares: Tensor | None, neighbourhood: Neighbourhood
) -> tuple[Tensor, int, Tensor, float]:
    """The loss, the tokens it is over, its pairs on this rank ``(groups, n)`` by place (see :class:`_Pairs`), and the
    factor of each pair's gradient."""
    groups, tokens, codes = log_mixtures.shape
    scores, chosen = [], []
    for group in range(groups):
        found = nearest_tokens(
            log_mixtures[group], None if squares is None else squares[group], neighbourhood.neighbours
        )
        scores.append(found[0])
        chosen.append(found[1])
    score, token = torch.stack(scores), torch.stack(chosen)  # (groups, codes, K)
    total, wanted = tokens, score.shape[-1]
    exchanged = neighbourhood.scope == "global" and neighbourhood.neighbours > 0
    if exchanged and collectives.world_size(neighbourhood.group) > 1:
        score, token, total, wanted = _of_all_ranks(score, token, tokens, neighbourhood)
    code = torch.arange(codes, device=token.device).unsqueeze(1)
    places = (token * codes + code).reshape(groups, -1).sort(dim=1).values
    if not tokens or not wanted:
        return log_mixtures.new_zeros(()), total, places, 0.0
    mean = score.sum() / (groups * codes * wanted)
    loss = -mean if squares is None else 1.0 - mean
    return loss, total, places, total / tokens / (groups * codes * wanted)


def _of_all_ranks(
    score: Tensor, token: Tensor, tokens: int, neighbourhood: Neighbourhood
) -> tuple[Tensor, Tensor, int, int]:
    """Scores of the nearest tokens of all ranks, and this rank's among them, ``tokens`` for those of others: the K
    nearest of all are among each rank's K nearest."""
    padding = neighbourhood.neighbours - score.shape[-1]
    padded = torch.nn.functional.pad(score, (0, padding), value=-torch.inf)
    gathered = collectives.all_gather(
        torch.cat([score.new_tensor([float(tokens)]), padded.reshape(-1)]), neighbourhood.group
    )
    total = int(gathered[:, 0].sum())
    wanted = min(neighbourhood.neighbours, total)
    by_rank = gathered[:, 1:].reshape(-1, *padded.shape).permute(1, 2, 0, 3).flatten(2)  # (groups, codes, ranks · K)
    best, places = _largest(by_rank, wanted)
    places = places - collectives.rank(neighbourhood.group) * neighbourhood.neighbours
    mine = (places >= 0) & (places < token.shape[-1])
    if not token.shape[-1]:
        return best, torch.full_like(places, tokens), total, wanted
    own = token.gather(-1, places.clamp(0, token.shape[-1] - 1))
    return best, torch.where(mine, own, tokens), total, wanted


@torch.no_grad()
def nearest_tokens(log_mixtures: Tensor, squares: Tensor | None, neighbours: int) -> tuple[Tensor, Tensor]:
    """The ``neighbours`` tokens that are nearest to each vertex of the simplex, or all when there are fewer; of equally
    near ones the earlier.

    log_mixtures ``(tokens, codes)``; squares ``(tokens,)``: |p|² for the squared distance, none for the cross-entropy
    → scores and tokens (int64), both ``(codes, K)``, nearest first. The score is 2p_m − |p|², which is 1 less the
    distance, or log p_m, which is its negative.
    """
    tokens, codes = log_mixtures.shape
    wanted = min(neighbours, tokens)
    if not wanted:
        empty = log_mixtures.new_empty(codes, 0)
        return empty, empty.long()
    elements = TILE_ELEMENTS.get(log_mixtures.device.type, TILE_ELEMENTS["cuda"])
    # Log p is read in place, and where each code's neighbours are few, what is made of it is small.
    shares = 1 if squares is None and tokens >= 64 * wanted else 4
    columns = max(1, min(elements // tokens, -(-codes // shares)))
    found = []
    for part in log_mixtures.split(columns, dim=1):
        scores = part if squares is None else part.exp().mul_(2).sub_(squares.unsqueeze(1))
        found.append(_largest_of_columns(scores, wanted))
    scores, chosen = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(chosen)


def _largest_of_columns(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest of each column and their rows: ``(rows, columns)`` → twice ``(columns, number)``, largest first, of
    equal ones the first.

    In two steps: the ``number`` largest lie in the ``number`` blocks of rows with the largest maxima, and maxima over
    rows need one pass without any transposition.
    """
    rows, columns = values.shape
    size = 1 << max(0, (rows // number).bit_length() // 2)  # about √(rows/number): both steps sort equally many
    whole = rows // size * size
    maxima = [values[:whole].unflatten(0, (-1, size)).amax(dim=1)] if whole else []
    if whole < rows:
        maxima.append(values[whole:].amax(dim=0, keepdim=True))
    by_block = torch.cat(maxima).T.contiguous()  # (columns, blocks)
    if by_block.shape[1] > number:
        blocks = _largest(by_block, number)[1].sort(dim=1).values
    else:
        blocks = torch.arange(by_block.shape[1], device=values.device).expand(columns, -1)
    candidates = (blocks.unsqueeze(2) * size + torch.arange(size, device=values.device)).flatten(1)
    found = values.T.gather(1, candidates.clamp(max=rows - 1)).masked_fill_(candidates >= rows, -torch.inf)
    best, places = _largest(found, number)
    return best, candidates.gather(1, places)


def _largest(values: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The largest of the last axis and their places, largest first, of equal ones the first, which topk leaves open."""
    best, places = values.topk(number, dim=-1)
    if not number:
        return best, places
    tied = (values >= best[..., -1:]).sum(dim=-1) > number
    if number > 1:
        tied |= (best[..., 1:] == best[..., :-1]).any(dim=-1)
    if bool(tied.any()):
        order = values[tied].sort(dim=-1, descending=True, stable=True)
        best[tied], places[tied] = order.values[:, :number], order.indices[:, :number]
    return best, places
