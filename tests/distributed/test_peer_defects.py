"""Defects that other quantizer libraries have or had on several ranks, each held against ours by a test.

The table of all defects is in tests/quantizers/test_peer_defects.py. Three ranks run all of this once; each test looks
at its part. A hang is the harness's timeout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline import collectives
from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import Quantizer, build_quantizer
from tests.distributed.harness import run_ranks
from tests.distributed.test_codebooks import COLLECTIVES
from tests.quantizers.test_contract import DIM, OPTIONS

RANKS = 3
GLOBAL = {
    "knn_global": {"kind": "knn_simplex", "codes": 5, "scope": "global"},
    "gumbel_global": {"kind": "gumbel", "codes": 5, "groups": 2, "scope": "global"},
    "lfq_global": {"kind": "lfq", "codes": 16, "groups": 3, "scope": "global"},
}
# sums over ranks round in another order than one process's: a few units in the last of fp32's 7 digits
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def build(**options: Any) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer({"dim": DIM, **options}).train()


def draw(tokens: int, seed: int) -> Tensor:
    return torch.randn(tokens, DIM, generator=torch.Generator().manual_seed(seed))


class Calls(list[tuple[str, int]]):
    """Names of the collectives called, with the number of elements that this rank gave."""

    def __enter__(self) -> Calls:
        self._plain = {name: getattr(distributed, name) for name in COLLECTIVES}
        for name, function in self._plain.items():
            setattr(distributed, name, self._counted(name, function))
        return self

    def __exit__(self, *error: Any) -> None:
        for name, function in self._plain.items():
            setattr(distributed, name, function)

    def _counted(self, name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            sizes = [value.numel() for value in args if isinstance(value, Tensor)]
            self.append((name, sum(sizes)))
            return function(*args, **kwargs)

        return counted


def unequal_k_means() -> tuple[Tensor, str]:
    """Rank 0 brings batches of several lengths, rank 1 none, rank 2 one of padding and one token."""
    model = nn.ModuleDict({"plain": build(kind="ema", codes=6), "levels": build(kind="residual", codes=4, levels=2)})
    batches = {
        0: [(draw(30, 1),), (draw(7, 2),)],
        1: [],
        2: [(draw(5, 3), torch.zeros(5, dtype=torch.bool)), (draw(1, 4),)],
    }[collectives.rank()]
    torch.manual_seed(collectives.rank())  # whatever a rank draws on its own must not matter
    initialise_codebooks(Both(model), batches)
    sync = CodebookSync(model)
    sync.check_ranks_agree()
    return model["plain"].codebook(), sync.checksum()


class Both(nn.Module):
    """All quantizers of a model see the same batch."""

    def __init__(self, quantizers: nn.ModuleDict) -> None:
        super().__init__()
        self.quantizers = quantizers

    def forward(self, batch: tuple[Tensor, ...]) -> None:
        for quantizer in self.quantizers.values():
            quantizer(*batch)


def rank_without_a_token() -> tuple[list[int], str]:
    """Rank 1 has padding only, or no micro-batch at all, while codes die and are replaced."""
    torch.manual_seed(collectives.rank())
    model = nn.ModuleDict(
        {
            "ema": build(kind="ema", codes=40, replace_after=2),
            "ste": build(kind="ste", codes=20, groups=2, replace_after=2, inner_steps=1),
            "residual": build(kind="residual", codes=20, levels=2, level={"replace_after": 2}),
        }
    )
    both, sync = Both(model), CodebookSync(model)
    replaced = []
    for step in range(6):
        latents = draw(20, 10 * step + collectives.rank())
        if collectives.rank() != 1:
            both((latents,))
        elif step % 2:
            both((latents, torch.zeros(20, dtype=torch.bool)))
        replaced.append(sum(found.replaced for found in sync.step().quantizers))
    sync.check_ranks_agree()
    return replaced, sync.checksum()


def chosen_on_one_rank() -> dict[str, Any]:
    """The last rank alone meets code 1; nobody meets the others."""
    quantizer = build(kind="ema", codes=64, replace_after=2)
    quantizer.set_codebook(torch.arange(64.0).reshape(1, 64, 1).expand(1, 64, DIM) * 100)
    sync = CodebookSync(quantizer)
    steps, usage = [], []
    for step in range(3):
        code = 1 if collectives.rank() == RANKS - 1 else 0
        quantizer(100.0 * code + draw(500, step))
        with Calls() as calls:
            health = sync.step()
        steps.append((list(calls), health.quantizers[0].replaced))
        usage.append(quantizer.idle_steps[0, :2].tolist())
    return {"steps": steps, "idle": usage, "checksum": sync.checksum()}


def built_before_the_process_group(folder: str) -> tuple[int, Tensor]:
    rank = collectives.rank()
    distributed.destroy_process_group()
    quantizer = build(kind="ema", codes=6)
    sync = CodebookSync(quantizer)
    quantizer(draw(10, 0))
    sync.step()
    alone = collectives.world_size()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=RANKS)
    quantizer(draw(10, 1 + rank))
    sync.step()
    return alone, quantizer.codebook()


def evaluated_alone() -> list[tuple[str, int]]:
    """Rank 0 evaluates, the others wait elsewhere; collectives that it called."""
    with Calls() as calls:
        if collectives.rank() == 0:
            for options in [*OPTIONS.values(), *GLOBAL.values()]:
                quantizer = build(**options).eval()
                out = quantizer(draw(20, 0), torch.arange(20) < 13)
                quantizer.encode(draw(20, 0))
                if quantizer.codes:
                    quantizer.decode(out.codes)
    return list(calls)


def side_by_side() -> dict[str, Any]:
    """Ranks 0 and 1 train one model, rank 2 another."""
    pair, single = distributed.new_group([0, 1]), distributed.new_group([2])
    group, place = (single, 0) if collectives.rank() == 2 else (pair, collectives.rank())
    model = build(kind="ema", codes=12, replace_after=2)
    shift = 10.0 * (collectives.rank() == 2)
    initialise_codebooks(model, [draw(40, place) + shift], process_group=group)
    sync = CodebookSync(model, process_group=group)
    replaced = 0
    for step in range(4):
        model(draw(4, 10 * step + place) + shift)
        replaced += sync.step().quantizers[0].replaced
    sync.check_ranks_agree()
    return {"checksum": sync.checksum(), "codebook": model.codebook(), "replaced": replaced}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(DIM, DIM)
        self.quantizer = build_quantizer({"kind": "ema", "dim": DIM, "codes": 6, "replace_after": 3})

    def forward(self, inputs: Tensor) -> Tensor:
        out = self.quantizer(self.encoder(inputs))
        return out.vectors.square().mean() + sum(out.losses.values())


def inside_ddp() -> dict[str, Tensor]:
    """DistributedDataParallel broadcasts rank 0's buffers before each forward, here of two micro-batches a step."""
    model = Model()
    wrapped = DistributedDataParallel(model, broadcast_buffers=True)
    sync = CodebookSync(model)
    for step in range(3):
        for number in range(2):
            wrapped(draw(20, 100 * step + RANKS * number + collectives.rank())).backward()
        sync.step()
    return {name: tensor.detach() for name, tensor in model.quantizer.state_dict().items()}


def different_dropout() -> dict[str, Any]:
    quantizer = build(kind="residual", codes=6, levels=4, dropout=1.0, level={"replace_after": 2})
    sync = CodebookSync(quantizer)
    kept, in_forward = [], []
    for step in range(5):
        torch.manual_seed(10 * step + collectives.rank())
        with Calls() as calls:
            out = quantizer(draw(20, 10 * step + collectives.rank()))
        in_forward += calls
        kept.append(int((out.codes[0] >= 0).sum()))
        sync.step()
    sync.check_ranks_agree()
    return {"kept": kept, "in_forward": in_forward, "checksum": sync.checksum()}


def run_all(folder: str) -> dict[str, Any]:
    return {
        "unequal_k_means": unequal_k_means(),
        "rank_without_a_token": rank_without_a_token(),
        "chosen_on_one_rank": chosen_on_one_rank(),
        "evaluated_alone": evaluated_alone(),
        "side_by_side": side_by_side(),
        "inside_ddp": inside_ddp(),
        "different_dropout": different_dropout(),
        "built_before": built_before_the_process_group(folder),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_all, RANKS, str(tmp_path_factory.mktemp("store")))


def of(runs: list[dict[str, Any]], name: str) -> list[Any]:
    return [run[name] for run in runs]


def test_k_means_where_ranks_bring_unequal_batches(runs):
    """LVQ#25, #30, #105, encodec#16: shapes that differ between ranks hang k-means; beit2: each rank has its own."""
    (codebook, checksum), *others = of(runs, "unequal_k_means")
    assert all(other == checksum for _, other in others)
    latents = torch.cat([draw(30, 1), draw(7, 2), draw(1, 4)])
    alone = build(kind="ema", codes=6)
    initialise_codebooks(alone, [latents])
    spread = torch.cdist(latents, latents.mean(dim=0, keepdim=True)).square().mean()
    for centres in (codebook[0], alone.codebook()[0]):  # another order of tokens: another k-means, as good
        assert torch.cdist(latents, centres).amin(dim=1).square().mean() < 0.75 * spread


def test_a_rank_without_a_token_while_codes_die(runs):
    """LVQ, TorchEasyRec PR#517: a rank whose batch is empty returns before the collectives that others wait in."""
    replaced, checksums = zip(*of(runs, "rank_without_a_token"), strict=True)
    assert len(set(checksums)) == 1
    assert replaced[0] == replaced[1] == replaced[2]
    assert sum(replaced[0]) > 0


def test_what_one_rank_alone_chose_lives_on_all(runs):
    """audiocraft PR#374, megatts2#18, encodec: ranks decide by their own counts which codes are dead, and call
    collectives unequally often. 1d-tokenizer gathers tokens x codes floats of each rank."""
    found = of(runs, "chosen_on_one_rank")
    assert found[0] == found[1] == found[2]
    assert found[0]["idle"] == [[0, 0]] * 3
    assert [replaced for _, replaced in found[0]["steps"]] == [0, 62, 0]
    names = [[name for name, _ in calls] for calls, _ in found[0]["steps"]]
    assert names == [["all_reduce"], ["all_reduce", "all_gather"], ["all_reduce"]]
    reduced, gathered = (size for _, size in found[0]["steps"][1][0])
    assert reduced == 64 * (1 + DIM)
    assert gathered == 62 * (2 + DIM)  # a dead code's candidate: a latent, its key and whether it is there


def test_one_rank_may_evaluate_alone(runs):
    """rosinality#70, LVQ with synchronised affine statistics: rank 0 evaluates and waits for the others for ever."""
    assert of(runs, "evaluated_alone") == [[]] * RANKS


def test_process_groups_train_side_by_side(runs):
    """No library of the 22 that were looked at takes a process group: they reduce over all ranks there are."""
    first, second, third = of(runs, "side_by_side")
    assert first["checksum"] == second["checksum"] != third["checksum"]
    assert first["replaced"] > 0
    assert third["replaced"] > 0
    assert first["codebook"].mean() < 1
    assert third["codebook"].mean() > 9


def test_buffers_that_an_engine_broadcasts_overwrite_no_statistics(runs):
    """encodec#16, FunCodec: what the other ranks counted gives way to rank 0's."""
    first, *others = of(runs, "inside_ddp")
    model = Model()
    sync = CodebookSync(model)
    for step in range(3):
        for number in range(2 * RANKS):
            model(draw(20, 100 * step + number))
        sync.step()
    for name, tensor in model.quantizer.state_dict().items():
        torch.testing.assert_close(first[name], tensor, **TOLERANCE)
        assert all(torch.equal(other[name], first[name]) for other in others)


def test_ranks_may_drop_different_levels(runs):
    """LVQ#198, audiolm#279: ranks agree on a seed by a collective in forward, which hangs when one has no forward."""
    found = of(runs, "different_dropout")
    assert len({tuple(result["kept"]) for result in found}) == RANKS
    assert [result["in_forward"] for result in found] == [[]] * RANKS
    assert len({result["checksum"] for result in found}) == 1


def test_a_module_built_before_the_process_group(runs):
    """LVQ remembers the first answer to "is this distributed?" for the life of the process."""
    alone, together = build(kind="ema", codes=6), of(runs, "built_before")
    sync = CodebookSync(alone)
    for tokens in ([0], range(1, 1 + RANKS)):
        alone(torch.cat([draw(10, seed) for seed in tokens]))
        sync.step()
    for world_size, codebook in together:
        assert world_size == 1
        torch.testing.assert_close(codebook, alone.codebook(), **TOLERANCE)
