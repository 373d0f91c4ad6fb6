"""The promise for codebooks, on real ranks: one all-reduce a step for all quantizers, and no rank waits forever.

What training with an encoder makes of them is in test_parity.py.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline import collectives
from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import build_quantizer, registry
from tests.distributed.harness import run_ranks

DIM = 8
MICRO_BATCHES = 6  # a step: 6, 3 or 2 on each of 1, 2 or 3 ranks
STEPS = 4
COLLECTIVES = [
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "send",
]
KINDS: dict[str, dict[str, Any]] = {
    "ema": {"kind": "ema", "codes": 12, "decay": 0.8},
    "ema_groups": {"kind": "ema", "codes": 6, "groups": 2, "update_empty": False},
    "ksom_hard": {"kind": "ksom", "codes": 12, "grid": [4, 3], "decay": 0.8, "shrink_step": 1.0},
    "ksom_gaussian": {"kind": "ksom", "codes": 12, "neighbourhood": "gaussian", "decay": 0.8},
    "gd_som": {"kind": "gd_som", "codes": 12},
    "som": {"kind": "som", "codes": 12, "steps": 9, "weight": 1.0},
    "ste": {"kind": "ste", "codes": 12},
    "ste_inner": {"kind": "ste", "codes": 12, "inner_steps": 2, "codebook_dim": 4},
    "affine": {"kind": "affine", "codes": 12, "affine": "running"},
    "simvq": {"kind": "simvq", "codes": 12},
    "rotation": {"kind": "rotation", "codes": 12},
    "gumbel": {"kind": "gumbel", "codes": 6, "groups": 2},
    "knn_simplex": {"kind": "knn_simplex", "codes": 6},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3]},
    "lfq": {"kind": "lfq", "codes": 16},
    "residual": {"kind": "residual", "codes": 12, "levels": 3},
    "identity": {"kind": "identity"},
}
GLOBAL = {
    "knn_simplex": {"kind": "knn_simplex", "codes": 6, "scope": "global"},
    "gumbel": {"kind": "gumbel", "codes": 6, "groups": 2, "scope": "global"},
    "lfq": {"kind": "lfq", "codes": 16, "scope": "global"},
}
REPLACING: dict[str, dict[str, Any]] = {
    "ema": {"kind": "ema", "codes": 40, "decay": 0.8, "replace_after": 2},
    "ste_groups": {"kind": "ste", "codes": 30, "groups": 2, "normalise": "l2", "replace_after": 2},
    "affine": {"kind": "affine", "codes": 90, "affine": "running", "replace_after": 3},
}
# sums over ranks round in another order than sums over micro-batches: a few units in the last of fp32's 7 digits
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _model(kinds: dict[str, dict[str, Any]]) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: build_quantizer({"dim": DIM, **options}) for name, options in kinds.items()})


def _micro_batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    """Latents ``(batch, frames, DIM)`` and an uneven mask; one micro-batch of the step is all padding."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    frames = 10 + 7 * number
    latents = torch.randn(2, frames, DIM, generator=generator) * (1 + number) + number
    mask = torch.rand(2, frames, generator=generator) < (0.9 if number != step % MICRO_BATCHES else 0.0)
    return latents, mask


def _train(kinds: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """A few optimiser steps with accumulation; how often collectives were called, and what the codebooks became."""
    model = _model(kinds).train()
    sync = CodebookSync(model)
    calls: list[str] = []
    for name in COLLECTIVES:
        _count(name, calls)
    rank, world_size = collectives.rank(), collectives.world_size()
    in_forward, in_step, health = [], [], []
    for step in range(steps):
        for number in range(rank, MICRO_BATCHES, world_size):
            latents, mask = _micro_batch(step, number)
            torch.manual_seed(number)
            for quantizer in model.values():
                quantizer(latents, mask)
        model.eval()
        for quantizer in model.values():
            quantizer(latents, mask)
            quantizer.encode(latents)
        model.train()
        in_forward += calls
        calls.clear()
        health.append(sync.step().summary())
        in_step.append(list(calls))
        calls.clear()
    return {
        "in_forward": in_forward,
        "in_step": in_step,
        "health": health,
        "state": {name: tensor.numpy() for name, tensor in model.state_dict().items()},
        "checksum": sync.checksum(),
    }


def _count(name: str, calls: list[str]) -> None:
    original = getattr(distributed, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    setattr(distributed, name, counted)


@pytest.fixture(scope="module")
def runs() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(_train, world_size, KINDS, STEPS) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_ranks_gives_the_same_codebooks(runs, world_size, kind):
    alone, together = runs[1][0]["state"], runs[world_size][0]["state"]
    names = [name for name in alone if name.startswith(f"{kind}.")]
    assert names
    for name in names:
        torch.testing.assert_close(torch.tensor(together[name]), torch.tensor(alone[name]), **TOLERANCE)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_codebooks_that_follow_statistics_have_moved(runs, world_size):
    before, after = _model(KINDS).state_dict(), runs[world_size][0]["state"]
    for name in ("ema.code_vectors", "ema_groups.code_vectors", "ksom_hard.code_vectors", "affine.latent_mean"):
        assert not torch.allclose(before[name], torch.tensor(after[name]), atol=1e-2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_equal_to_the_bit(runs, world_size):
    assert len({run["checksum"] for run in runs[world_size]}) == 1
    first, *others = (run["state"] for run in runs[world_size])
    for other in others:
        assert all((first[name] == other[name]).all() for name in first)


@pytest.mark.parametrize("world_size", [2, 3])
def test_health_is_that_of_the_joint_batch(runs, world_size):
    for run in runs[world_size]:
        for alone, together in zip(runs[1][0]["health"], run["health"], strict=True):
            assert together.keys() == alone.keys()
            assert together == pytest.approx(alone, rel=1e-9)


def test_every_kind_is_here():
    assert {options["kind"] for options in KINDS.values()} == set(registry.KINDS)
    has_scope = {kind for kind, (config, _) in registry.KINDS.items() if "scope" in config.model_fields}
    assert {options["kind"] for options in GLOBAL.values()} == has_scope


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_all_reduce_a_step_and_none_elsewhere(runs, world_size):
    """For all kinds with default options at once, however many quantizers there are."""
    for run in runs[world_size]:
        assert run["in_step"] == [["all_reduce"]] * STEPS
        assert run["in_forward"] == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_terms_over_all_ranks_add_one_collective_a_training_forward(world_size):
    """And none in evaluation, whose forwards :func:`_train` has too; one rank has nobody to ask."""
    for run in run_ranks(_train, world_size, GLOBAL, STEPS):
        forwards = STEPS * MICRO_BATCHES // world_size * len(GLOBAL)
        assert len(run["in_forward"]) == (forwards if world_size > 1 else 0)
        assert run["in_step"] == ([["all_reduce"]] if world_size > 1 else [[]]) * STEPS


@pytest.fixture(scope="module")
def replacing_runs() -> dict[int, list[dict[str, Any]]]:
    return {world_size: run_ranks(_train, world_size, REPLACING, 2 * STEPS) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_replaces_the_same_codes_by_the_same_latents(replacing_runs, world_size):
    alone = replacing_runs[1][0]["state"]
    assert len({run["checksum"] for run in replacing_runs[world_size]}) == 1
    for name, value in replacing_runs[world_size][0]["state"].items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(alone[name]), **TOLERANCE)


def test_dead_codes_were_replaced(replacing_runs):
    before, after = _model(REPLACING).state_dict(), replacing_runs[1][0]["state"]
    for name in (
        "ste_groups.code_vectors.weight",
        "affine.code_vectors.weight",
    ):  # no optimiser: nothing else moves these
        moved = (before[name] != torch.tensor(after[name])).any(dim=-1)
        assert 0 < int(moved.sum()) < moved.numel()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_that_replaces_gathers_once_and_others_not_at_all(replacing_runs, world_size):
    for run in replacing_runs[world_size]:
        assert run["in_step"][0] == ["all_reduce"]  # no code can be dead yet
        assert {tuple(calls) for calls in run["in_step"]} == {("all_reduce",), ("all_reduce", "all_gather")}
        assert run["in_forward"] == []


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(DIM, DIM), nn.Dropout(0.5))
        self.first = build_quantizer({"kind": "ksom", "dim": DIM, "codes": 16})
        self.second = build_quantizer({"kind": "ste", "dim": DIM, "codes": 8, "groups": 2, "normalise": "l2"})

    def forward(self, batch: tuple[Tensor, Tensor]) -> None:
        latents, mask = batch
        self.first(self.encoder(latents), mask=mask)
        self.second(self.encoder(latents), mask)


def _initialise(samples_per_code: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Encoder().train()
    if collectives.rank():  # whatever the ranks start from, they end up with the same codes
        for quantizer in (model.first, model.second):
            for tensor in quantizer.state_dict().values():
                tensor.add_(1)
    numbers = range(collectives.rank(), MICRO_BATCHES, collectives.world_size())
    batches = (_micro_batch(0, number) for number in numbers)
    initialise_codebooks(model, batches, method="kmeans", samples_per_code=samples_per_code)
    CodebookSync(model).check_ranks_agree()
    assert all(module.training for module in model.modules())
    return {
        name: tensor.detach().numpy()
        for name, tensor in model.state_dict().items()
        if not name.startswith("encoder") and collectives.rank() == 0
    }


@pytest.mark.parametrize("samples_per_code", [4, 1000])  # a sample of the latents, and all of them
def test_initialisation_is_the_same_to_the_bit_on_any_number_of_ranks(samples_per_code):
    results = [run_ranks(_initialise, world_size, samples_per_code)[0] for world_size in (1, 2, 3)]
    fresh = {name: tensor for name, tensor in _Encoder().state_dict().items() if not name.startswith("encoder")}
    assert results[0].keys() == fresh.keys()
    assert not torch.equal(torch.tensor(results[0]["first.code_vectors"]), fresh["first.code_vectors"])
    for other in results[1:]:
        for name, value in results[0].items():
            assert (value == other[name]).all(), name


def _drift() -> str:
    quantizer = build_quantizer({"kind": "ema", "dim": DIM, "codes": 4})
    sync = CodebookSync(quantizer)
    sync.check_ranks_agree()
    quantizer.code_vectors[0, 0, 0].add_(1e-6 * collectives.rank())
    with pytest.raises(RuntimeError) as caught:
        sync.check_ranks_agree()
    return str(caught.value)


def _build_different_models() -> str:
    with pytest.raises(RuntimeError) as caught:
        CodebookSync(build_quantizer({"kind": "ema", "dim": DIM, "codes": 4 + collectives.rank()}))
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [(_drift, "codebook checksums differ"), (_build_different_models, "the models' quantizers differ")],
)
def test_ranks_that_differ_are_told_apart_before_they_hang(function, message):
    for text in run_ranks(function, 2):
        assert text.startswith(message)
        assert "rank 0: " in text
        assert "rank 1: " in text


def _start_apart() -> str:
    torch.manual_seed(collectives.rank())
    model = _model(KINDS)
    sync = CodebookSync(model)
    sync.check_ranks_agree()
    return sync.checksum()


def test_ranks_start_with_rank_0s_codebooks():
    torch.manual_seed(0)
    assert len(set(run_ranks(_start_apart, 2))) == 1


def _global_neighbours() -> tuple[float, list[float]]:
    """The joint loss of all ranks' tokens, and this rank's gradient as the engine would average it."""
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {"kind": "knn_simplex", "dim": DIM, "codes": 5, "neighbours": 3, "weight": 1.0, "scope": "global"}
    )
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(36, DIM, generator=generator).chunk(collectives.world_size())[collectives.rank()]
    latents = latents.clone().requires_grad_()
    loss = quantizer(latents).losses["knn"]
    loss.backward()
    joint = collectives.all_reduce_sum(loss.detach().clone()) / collectives.world_size()
    assert latents.grad is not None
    gradient = collectives.all_gather(latents.grad).reshape(36, DIM) / collectives.world_size()
    return float(joint), gradient.flatten().tolist()


def test_neighbours_in_the_global_scope_are_those_of_the_joint_batch():
    (alone, gradient), *_ = run_ranks(_global_neighbours, 1)
    for loss, gradients in run_ranks(_global_neighbours, 3):
        assert loss == pytest.approx(alone, rel=1e-5)
        assert gradients == pytest.approx(gradient, rel=1e-4, abs=1e-7)


def _meet_nan(name: str, options: dict[str, Any]) -> tuple[str, bool]:
    """The last rank meets NaN in its third step; every rank's error, and whether its codebook stayed as it was."""
    torch.manual_seed(0)
    group = distributed.new_group(timeout=timedelta(seconds=3))  # what collective_timeout is in a recipe
    model = nn.ModuleDict({name: build_quantizer({"dim": DIM, **options})})
    sync = CodebookSync(model, process_group=group)
    for step in range(5):
        latents, _ = _micro_batch(step, collectives.rank())
        before = sync.checksum()
        if step == 2 and collectives.rank() == collectives.world_size() - 1:
            latents[1, 3, 2] = torch.nan
            latents[0, 1, 0] = torch.inf
        try:
            model[name](latents)
            sync.step()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}", sync.checksum() == before
    return "no error", False


@pytest.mark.parametrize("kind", ["ema", "ste_inner"])
def test_nan_on_one_rank_is_named_there_and_nobody_waits_forever(kind):
    *others, met = run_ranks(_meet_nan, 2, kind, KINDS[kind], timeout=60)
    message, unchanged = met
    assert message.startswith(f"InfiniteLatents: {kind}, step 2: 2 of 34 latents hold NaN or infinity")
    assert unchanged
    for message, unchanged in others:
        assert message.startswith("RuntimeError: ")
        assert "imed out" in message
        assert unchanged
