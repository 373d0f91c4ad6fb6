"""Health of watched steps is that of the joint batch, on any number of ranks, and comes with the step's one all-reduce.

Latents are summed in fp32 about the origin, so a measure inherits rounding errors of 6e-8 of the mean square of what it
is a small difference of: the largest relative difference measured was 7e-5.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from pipeline import collectives
from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from tests.distributed.harness import run_ranks

DIM, MICRO_BATCHES, STEPS, WATCH_EVERY = 8, 4, 4, 2
KINDS: dict[str, dict[str, Any]] = {
    "ema": {"kind": "ema", "codes": 12},
    "ksom": {"kind": "ksom", "codes": 12, "grid": [4, 3]},
    "gd_som": {"kind": "gd_som", "codes": 12},
    "affine": {"kind": "affine", "codes": 12, "codebook_dim": 4},
    "knn": {"kind": "knn_simplex", "codes": 6, "logits": "distance"},
    "gumbel": {"kind": "gumbel", "codes": 6, "groups": 2},
    "residual": {"kind": "residual", "codes": 8, "levels": 2},
    "identity": {"kind": "identity"},
}


def _micro_batch(step: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + number)
    latents = torch.randn(3, 300 + 250 * number, DIM, generator=generator) + 0.5
    mask = torch.rand(latents.shape[:2], generator=generator) < 0.8
    if number == 3:
        mask[:] = False  # of 4 ranks the last has no token
    return latents, mask


def _watch() -> list[tuple[dict[str, float], list[str]]]:
    """Each step's health and the collectives of its ``sync.step()``."""
    warnings.simplefilter("ignore")  # knn_simplex warns of micro-batches with few tokens
    torch.manual_seed(0)
    model = nn.ModuleDict({name: build_quantizer({"dim": DIM, **options}) for name, options in KINDS.items()})
    sync = CodebookSync(model.train(), watch_every=WATCH_EVERY)
    calls: list[str] = []
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "barrier"):
        _count(name, calls)
    steps = []
    for step in range(STEPS):
        for number in range(collectives.rank(), MICRO_BATCHES, collectives.world_size()):
            torch.manual_seed(number)  # sampling noise belongs to the micro-batch
            for quantizer in model.values():
                quantizer(*_micro_batch(step, number))
        calls.clear()
        summary = sync.step().summary()
        steps.append((summary, list(calls)))
    return steps


def _count(name: str, calls: list[str]) -> None:
    original = getattr(distributed, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    setattr(distributed, name, counted)


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, float], list[str]]]:
    return run_ranks(_watch, 1)[0]


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_measures_the_same(alone, world_size):
    for steps in run_ranks(_watch, world_size):
        for step, ((expected, _), (health, calls)) in enumerate(zip(alone, steps, strict=True), start=1):
            assert calls == ["all_reduce"]
            assert health.keys() == expected.keys()
            assert any(name.startswith("latent_dimension") for name in health) == (step % WATCH_EVERY == 0)
            assert health == pytest.approx(expected, rel=1e-4, abs=1e-6)
