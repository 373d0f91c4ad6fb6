"""Losses that are not linear in tokens, joined over ranks (``scope=global``): what one process makes of all tokens.

Averaging the ranks' own diversity losses or entropies, or all-reducing them out of autograd's sight, gives neither the
joint value nor its gradient (vector-quantize-pytorch issue 148; fairseq's wav2vec 2.0 quantizer on several ranks).
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from pipeline import collectives
from pipeline.quantizers import build_quantizer
from tests.distributed.harness import run_ranks

DIM = 4
SHARDS = 4  # shards of one joint batch: all, two or one on each of 1, 2 or 4 ranks
EMPTY = 2  # this shard is all padding: of 4 ranks with one each, one is empty
KINDS: dict[str, dict[str, Any]] = {
    "gumbel": {"kind": "gumbel", "diversity_weight": 1.0, "codes": 5, "groups": 2},
    "knn_cross_entropy": {"kind": "knn_simplex", "weight": 1.0, "codes": 5, "groups": 2},
    "knn_l2": {
        "kind": "knn_simplex",
        "weight": 1.0,
        "codes": 6,
        "distance": "l2",
        "logits": "distance",
        "neighbours": 1,
    },
    # more neighbours than the smallest shard and, in the last, than all shards have tokens
    "knn_many": {"kind": "knn_simplex", "weight": 1.0, "codes": 3, "logits": "linear", "neighbours": 7},
    "knn_all": {"kind": "knn_simplex", "weight": 1.0, "codes": 3, "distance": "l2", "neighbours": 500},
}


def _shard(number: int) -> tuple[Tensor, Tensor]:
    """Latents ``(1, 24, DIM)`` of one speaker each, and an uneven mask. Some tokens occur in several shards: ties."""
    generator = torch.Generator().manual_seed(number)
    latents = torch.randn(1, 24, DIM, generator=generator) + 2 * torch.randn(DIM, generator=generator)
    latents[:, :3] = torch.linspace(-3, 3, DIM)
    mask = torch.rand(1, 24, generator=generator) < (0.0 if number == EMPTY else 0.2 + 0.25 * number)
    mask[:, :3] = number != EMPTY
    return latents, mask


def _joint(options: dict[str, Any], empty: bool = False) -> dict[str, Any]:
    """One forward of this rank's shards; the loss, and the gradients that a trainer would apply."""
    torch.manual_seed(0)
    quantizer = build_quantizer({"dim": DIM, **options}).train()
    if "head" in dict(quantizer.named_children()):
        torch.nn.init.normal_(quantizer.head.weight)
    share = SHARDS // collectives.world_size()
    first = collectives.rank() * share
    latents, mask = (torch.cat(parts, dim=1) for parts in zip(*map(_shard, range(first, first + share)), strict=True))
    mask &= not empty
    latents.requires_grad_()
    calls: list[str] = []
    for name in ("all_reduce", "all_gather"):
        _count(name, calls)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        out = quantizer(latents, mask)
    in_forward = list(calls)
    calls.clear()
    quantizer.eval()(latents, mask)
    in_evaluation = list(calls)
    (loss,) = out.losses.values()
    tokens = int(mask.sum())
    total = int(collectives.all_reduce_sum(torch.tensor([tokens])))
    (loss * (tokens / max(1, total))).backward()
    gradients = {
        name: collectives.all_reduce_sum(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for name, parameter in quantizer.named_parameters()
    }
    gradients["latents"] = collectives.all_gather(latents.grad).transpose(0, 1).reshape(SHARDS * 24, DIM)
    return {
        "tokens": tokens,
        "loss": float(loss.detach()),
        "gradients": {name: gradient.numpy() for name, gradient in gradients.items()},
        "in_forward": in_forward,
        "in_evaluation": in_evaluation,
        "told": [str(warning.message) for warning in told],
    }


def _count(name: str, calls: list[str]) -> None:
    original = getattr(distributed, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    setattr(distributed, name, counted)


def _all(scope: str, empty: bool = False) -> dict[str, dict[str, Any]]:
    return {name: _joint({**options, "scope": scope}, empty) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return run_ranks(_all, 1, "micro_batch")[0]


@pytest.fixture(scope="module")
def together() -> dict[int, list[dict[str, dict[str, Any]]]]:
    return {world_size: run_ranks(_all, world_size, "global") for world_size in (1, 2, 4)}


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_one_process_with_all_tokens(alone, together, world_size, kind):
    expected = alone[kind]
    assert any(abs(gradient).max() > 1e-3 for gradient in expected["gradients"].values())
    for rank, found in enumerate(run[kind] for run in together[world_size]):
        if found["tokens"]:
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        else:
            assert (world_size, rank, found["loss"]) == (SHARDS, EMPTY, 0.0)
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(
                torch.tensor(found["gradients"][name]), torch.tensor(gradient), atol=1e-6, rtol=1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_tokens_have_the_same_loss_to_the_bit(together, kind):
    for world_size in (2, 4):
        assert len({run[kind]["loss"] for run in together[world_size] if run[kind]["tokens"]}) == 1


def test_the_mean_of_the_ranks_own_losses_is_another_thing(alone):
    """What the comparison above would find if nothing were exchanged."""
    run = run_ranks(_all, 4, "micro_batch")[0]
    for kind in ("gumbel", "knn_cross_entropy", "knn_l2", "knn_many"):
        found = run[kind]
        assert abs(found["gradients"]["latents"] - alone[kind]["gradients"]["latents"]).max() > 1e-3
        assert found["in_forward"] == []


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_one_collective_a_forward_in_training_and_none_at_inference(together, world_size, kind):
    for run in together[world_size]:
        assert run[kind]["in_forward"] == ["all_reduce" if kind == "gumbel" else "all_gather"]
        assert run[kind]["in_evaluation"] == []


def test_too_few_tokens_are_those_of_all_ranks(together):
    total = sum(run["knn_many"]["tokens"] for run in together[4])
    assert any(run["knn_many"]["tokens"] < 3 * 7 <= total for run in together[4])
    assert all(run["knn_many"]["told"] == [] for run in together[4])
    for run in together[4]:
        assert any(f"got {total} tokens for neighbours=500" in text for text in run["knn_all"]["told"])


def test_no_tokens_anywhere_are_no_loss_and_no_gradient():
    for run in run_ranks(_all, 2, "global", True):
        for found in run.values():
            assert found["loss"] == 0
            assert all((gradient == 0).all() for gradient in found["gradients"].values())
