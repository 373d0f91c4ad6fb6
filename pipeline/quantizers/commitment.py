"""Codes in the place of latents, and the latents' pull towards them, in one pass.

In: latents, a codebook that no gradient reaches, codes. Out: the codes' vectors, with the straight-through gradient,
and the commitment loss. A pure function.

What ``straight_through`` and ``mean_square`` of base.py say in turn, this does with a single tensor of the latents'
size forward and one backward: on a CPU each further one is fresh pages, and costs more than the arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 17}
"""Elements that one step looks at, so that what it wrote is still in cache when it reads it; all of them elsewhere."""


def commit(latents: Tensor, codebook: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of ``codes``, with their gradient passed to ``latents`` unchanged, and ``mean((sg(c) − z)²)``.

    latents ``(tokens, groups · code_dim)`` fp32, codebook ``(groups, codes, code_dim)``, codes ``(tokens, groups)``
    int64 → vectors as latents, and a scalar that is 0 for no tokens.
    """
    vectors, loss = _Commit.apply(latents, codebook.detach(), codes)
    return vectors, loss


class _Commit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latents: Tensor, codebook: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        groups, number, code_dim = codebook.shape
        rows = codebook.reshape(groups * number, code_dim)
        places = (codes + torch.arange(groups, device=codes.device) * number).reshape(-1)
        vectors = torch.empty(latents.shape, dtype=codebook.dtype, device=latents.device)
        loss = torch.zeros((), dtype=codebook.dtype, device=latents.device)
        for part in _chunks(latents):
            chosen = places[part.start * groups : part.stop * groups]
            torch.index_select(rows, 0, chosen, out=vectors[part].view(-1, code_dim))
            difference = (vectors[part] - latents[part]).view(-1)
            loss += torch.dot(difference, difference)
        ctx.save_for_backward(latents, vectors)
        ctx.set_materialize_grads(False)
        return vectors, loss / max(1, latents.numel())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        of_vectors, of_loss = gradients
        if of_loss is None:
            return of_vectors, None, None
        latents, vectors = ctx.saved_tensors
        scale = of_loss * (2 / max(1, latents.numel()))
        if torch.is_grad_enabled():  # someone wants this gradient's own gradient
            gradient = (latents - vectors.detach()) * scale
            return gradient if of_vectors is None else gradient + of_vectors, None, None
        gradient = torch.empty_like(latents)
        for part in _chunks(latents):
            torch.sub(latents[part], vectors[part], out=gradient[part])
            if of_vectors is None:
                gradient[part] *= scale
            else:
                torch.addcmul(of_vectors[part], gradient[part], scale, out=gradient[part])
        return gradient, None, None


def _chunks(latents: Tensor) -> list[slice]:
    tokens, dim = latents.shape
    size = max(1, CHUNK_ELEMENTS.get(latents.device.type, latents.numel()) // dim)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
