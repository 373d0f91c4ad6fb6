"""The hard Gumbel softmax of linear logits, in one differentiable function.

In: latents, the weights of logits, codes. Out: one code of each group, its vector, and sums of probabilities. Pure but
for the noise that it draws. Autograd would make a tensor of tokens × codes of each step on the way, and take a product
only for its gradient; kept here are the noisy softmax and the plain one, and the rest passes through tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.quantizers.search import first_maximum
from pipeline.quantizers.tiles import Tiles, gumbel_noise


class Draws(NamedTuple):
    """What :func:`draw` gives."""

    vectors: Tensor
    """``(tokens, groups, code_dim)``: the chosen codes' own values, differentiable."""
    sums: Tensor
    """``(groups, codes)``: softmax of the logits without noise, summed over tokens, differentiable."""
    codes: Tensor
    """``(tokens, groups)`` int64."""


def draw(latents: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, temperature: Tensor) -> Draws:
    """Codes drawn by argmax(logits + Gumbel noise), logits = z·Wᵀ + b (Jang et al., arXiv 1611.01144,
    straight-through).

    latents ``(tokens, groups, dim)``, weight ``(groups, codes, dim)``, bias ``(groups, codes)``, codebook
    ``(groups, codes, code_dim)``, all of one floating dtype; temperature: a scalar. Differentiable once in the four: a
    code by the gradients of the tokens that chose it, logits as if softmax((logits + noise)/temperature)·C had been
    taken, and both sums as they are.
    """
    return Draws(*_Draw.apply(latents, weight, bias, codebook, temperature))  # type: ignore[no-untyped-call]


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, groups, _ = latents.shape
        number = codebook.shape[1]
        noisy = gumbel_noise(latents.new_empty(tokens, groups, number))
        plain = torch.empty_like(noisy)
        vectors = latents.new_empty(tokens, groups, codebook.shape[2])
        codes = torch.empty(tokens, groups, dtype=torch.int64, device=latents.device)
        sums = latents.new_zeros(groups, number)
        tiles = Tiles(latents, tokens, number, 1)
        with torch.autocast(latents.device.type, enabled=False):
            for group in range(groups):
                for rows, (tile,) in tiles:
                    torch.addmm(bias[group], latents[rows, group], weight[group].T, out=tile)
                    drawn, kept = noisy[rows, group], plain[rows, group]
                    drawn.add_(tile)
                    codes[rows, group] = first_maximum(drawn)
                    drawn.copy_(torch.softmax(drawn.div_(temperature), dim=-1, out=kept))
                    sums[group] += torch.softmax(tile, dim=-1, out=kept).sum(dim=0)
                torch.index_select(codebook[group], 0, codes[:, group], out=vectors[:, group])
        ctx.save_for_backward(latents, weight, codebook, temperature, noisy, plain, codes)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        return vectors, sums, codes

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, of_vectors: Tensor | None, of_sums: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        latents, weight, codebook, temperature, noisy, plain, codes = ctx.saved_tensors
        tokens, groups, number = noisy.shape
        of_latents, of_weight = torch.empty_like(latents), torch.zeros_like(weight)
        of_bias, of_codebook = weight.new_zeros(groups, number), torch.zeros_like(codebook)
        tiles = Tiles(latents, tokens, number, 2)
        with torch.autocast(latents.device.type, enabled=False):
            for group in range(groups):
                if of_vectors is not None:
                    of_codebook[group].index_add_(0, codes[:, group], of_vectors[:, group])
                for rows, (gradient, spare) in tiles:
                    if of_vectors is None:
                        gradient.zero_()
                    else:
                        soft = noisy[rows, group]
                        torch.mm(of_vectors[rows, group] / temperature, codebook[group].T, out=gradient)
                        torch.mul(gradient, soft, out=spare)
                        torch.addcmul(spare, soft, -spare.sum(dim=1, keepdim=True), out=gradient)
                    if of_sums is not None:
                        soft, upstream = plain[rows, group], of_sums[group]
                        torch.sub(upstream, (soft @ upstream).unsqueeze(1), out=spare)
                        gradient.addcmul_(soft, spare)
                    of_latents[rows, group] = gradient @ weight[group]
                    of_weight[group].addmm_(gradient.T, latents[rows, group])
                    of_bias[group] += gradient.sum(dim=0)
        return of_latents, of_weight, of_bias, of_codebook, None
