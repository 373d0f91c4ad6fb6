"""Any number of ranks trains the codebook that one rank trains, for every kind of quantizer.

Each kind trains for several optimiser steps on six micro-batches a step, with ragged padding masks, gradient
accumulation, k-means initialisation and, where the kind has it, replacement of dead codes: on 1, 2 and 3 gloo ranks.
Sums of fp32 are made in another order on another number of ranks, which changes their last bits and nothing else: the
tolerance is 1e-5 on values of about 1. Between the ranks of one run every bit must agree.
"""

import pytest
import torch
from torch import nn

from pipeline import collectives
from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import build_quantizer
from tests.distributed.harness import run_ranks

MICRO_BATCHES, STEPS, DIM = 6, 7, 8
KINDS = {
    "identity": {"kind": "identity"},
    "ema": {"kind": "ema", "codes": 24, "decay": 0.9},
    "ema-groups-replace": {"kind": "ema", "codes": 40, "groups": 2, "decay": 0.9, "replace_after": 2},
    "ema-no-update-0": {"kind": "ema", "codes": 24, "decay": 0.9, "count_init": 0, "update_empty": False},
    "ksom-hard": {"kind": "ksom", "codes": 24, "grid": [6, 4], "decay": 0.9},
    "ksom-gaussian": {"kind": "ksom", "codes": 24, "groups": 2, "neighbourhood": "gaussian", "decay": 0.9},
    "ksom-exponential": {"kind": "ksom", "codes": 24, "grid": [24], "neighbourhood": "exponential"},
    "ste": {"kind": "ste", "codes": 24, "sync_nu": 0.1},
    "ste-l2-replace": {"kind": "ste", "codes": 40, "normalise": "l2", "replace_after": 2},
    "affine-running": {"kind": "affine", "codes": 40, "groups": 2, "affine": "running", "replace_after": 2},
    "affine-learned": {"kind": "affine", "codes": 24, "affine": "learned", "affine_groups": 2},
    "knn-softmax": {"kind": "knn_simplex", "codes": 24, "logits": "distance", "distance": "l2"},
    "knn-gumbel": {"kind": "knn_simplex", "codes": 24, "groups": 2, "logits": "linear", "sampler": "gumbel"},
    "gumbel": {"kind": "gumbel", "codes": 24, "groups": 2, "temperature": [2.0, 0.5, 0.9]},
}
REPLACING = [name for name, options in KINDS.items() if "replace_after" in options]


class Model(nn.Module):
    """An encoder and a quantizer, trained to reach targets."""

    def __init__(self, options):
        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        self.quantizer = build_quantizer({"dim": DIM, **options})

    def forward(self, batch):
        inputs, mask, _ = batch
        return self.quantizer(self.encoder(inputs), mask)


def micro_batch(step, number):
    """(inputs, mask, targets) of one micro-batch, a function of its place alone: 10 clusters, rows padded raggedly."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    centres = 2 * torch.randn(10, DIM, generator=torch.Generator().manual_seed(5))
    inputs = centres[torch.randint(10, (4, 9), generator=generator)]
    inputs = inputs + 0.05 * torch.randn(inputs.shape, generator=generator)
    lengths = torch.randint(0, 10, (4, 1), generator=generator)
    mask = torch.arange(9) < lengths
    if number == 4:
        mask[:] = False  # a micro-batch, and on 3 ranks half a rank's step, without a real token
    inputs[~mask] = 1e3  # padding must not matter
    return inputs, mask, inputs.roll(1, dims=-1)


def train(options):
    """Train on the ranks that exist; returns state, codes of the last step by micro-batch number, replacements."""
    torch.manual_seed(3)
    model = Model(options)
    rank, world_size = collectives.rank(), collectives.world_size()
    numbers = range(rank, MICRO_BATCHES, world_size)
    sync = CodebookSync(model)
    if options["kind"] not in ("identity", "gumbel"):
        initialise_codebooks(model, [micro_batch(0, number) for number in numbers])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    sync.replacement.optimizer = optimizer
    codes, replaced, checks = {}, 0, []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = sum(int(micro_batch(step, number)[1].sum()) for number in range(MICRO_BATCHES))
        for number in numbers:
            batch = micro_batch(step, number)
            torch.manual_seed(100 * step + number)  # sampling noise belongs to the micro-batch
            output = model(batch)
            mask = batch[1]
            task = 0.1 * (output.vectors - batch[2])[mask].square().sum() / DIM
            loss = task + sum(output.losses.values()) * int(mask.sum())
            (loss / total).backward()
            codes[number] = output.codes
        for parameter in model.parameters():
            collectives.all_reduce_sum(parameter.grad)
        optimizer.step()
        health = sync.step()
        replaced += sum(quantizer.replaced for quantizer in health.quantizers)
        checks.append(health.summary())
    sync.check_ranks_agree()
    return {"state": model.state_dict(), "codes": codes, "replaced": replaced, "health": checks}


def train_all():
    return {name: train(options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def runs():
    return {world_size: run_ranks(train_all, world_size) for world_size in (1, 2, 3)}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_more_ranks_train_the_same_codebook(runs, name, world_size):
    (expected,) = (result[name] for result in runs[1])
    for actual in (result[name] for result in runs[world_size]):
        for key, value in expected["state"].items():
            torch.testing.assert_close(
                actual["state"][key], value, atol=1e-5, rtol=1e-5, msg=lambda t, key=key: key + t
            )
        for number, codes in actual["codes"].items():
            assert torch.equal(codes, expected["codes"][number]), f"micro-batch {number}"
        assert actual["replaced"] == expected["replaced"]
        for health, expected_health in zip(actual["health"], expected["health"], strict=True):
            assert health == pytest.approx(expected_health)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_ranks_of_one_run_agree_to_the_bit(runs, name, world_size):
    first, *others = (result[name]["state"] for result in runs[world_size])
    for other in others:
        for key, value in first.items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("name", REPLACING)
def test_codes_were_replaced(runs, name):
    assert runs[1][0][name]["replaced"] > 0


def test_training_moved_the_codebooks(runs):
    """Parity of codebooks that stood still would say nothing."""
    for name, options in KINDS.items():
        if name != "identity":
            torch.manual_seed(3)
            before = Model(options).quantizer.codebook()
            trained = Model(options)
            trained.load_state_dict(runs[1][0][name]["state"])
            assert (trained.quantizer.codebook() - before).abs().max() > 2e-3, name


def _global_neighbours(world_size):
    """Gradients of knn_simplex with scope=global: this rank's third of twelve rows, token-weighted and summed."""
    results = {}
    for distance in ("cross_entropy", "l2"):
        torch.manual_seed(0)
        options = {"kind": "knn_simplex", "dim": DIM, "codes": 8, "groups": 2, "scope": "global", "neighbours": 3}
        quantizer = build_quantizer(options | {"distance": distance})
        latents = torch.randn(12, 5, DIM)
        latents[3] = latents[2]  # equal tokens on one rank and on two: ties
        latents[4:6] = latents[2]
        mask = torch.rand(12, 5) > 0.4
        mask[8:] = False  # on 3 ranks the last one is empty
        rows = torch.arange(12).chunk(world_size)[collectives.rank()]
        output = quantizer(latents[rows], mask[rows])
        loss = output.losses["knn"] * (mask[rows].sum() / mask.sum())
        loss.backward()
        gradient = collectives.all_reduce_sum(quantizer.code_vectors.weight.grad)
        results[distance] = (collectives.all_reduce_sum(loss.detach()), gradient)
    return results


def test_global_neighbours_are_those_of_the_joint_batch():
    (expected,) = run_ranks(_global_neighbours, 1, 1)
    for world_size in (2, 3):
        for actual in run_ranks(_global_neighbours, world_size, world_size):
            for distance, (loss, gradient) in expected.items():
                torch.testing.assert_close(actual[distance][0], loss, atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(actual[distance][1], gradient, atol=1e-6, rtol=1e-4)
