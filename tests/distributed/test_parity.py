"""Any number of ranks trains the codebook that one rank trains, for every kind of quantizer (design, section 2).

Each kind trains for 20 optimiser steps with an encoder, with ragged padding masks, gradient accumulation, k-means
initialisation and, where the kind has it, replacement of dead codes. 1, 2 and 4 gloo ranks share the same 4
micro-batches a step (accumulation 4, 2, 1) or the same 16 (16, 8, 4), with and without activation checkpointing. One
micro-batch of each step is nothing but padding: of 4 ranks with one each, one is empty.

Sums over micro-batches are made in another order on another number of ranks, which changes their last bits: an
addition of fp32 rounds by up to 6e-8 of its result, a step adds up to some hundred tokens, and the next step starts
from its errors. The largest error measured after the 20 steps, relative to 1 + |value|, was 1.5e-6 (residual levels, 16
micro-batches); TOLERANCE is six times that. A defect is far from it: codes move by more than 1e-2
(``test_training_moved_the_codebooks``), and a micro-batch counted wrongly changes a good part of that.

Codes must be equal, not close. A rounding error would turn a token's code where two codes are equally near to it, so
the data may hold no near ties: tokens are drawn from a few points well apart, and replaced codes get enough noise to
lie apart too; ``test_no_token_is_near_a_tie`` says so of the run on one rank. Between the ranks of one run every bit
must agree.
"""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline import collectives
from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import Quantizer, build_quantizer, registry
from tests.distributed.harness import run_ranks

STEPS, DIM, ROWS, FRAMES, POINTS = 20, 8, 4, 12, 48
SEED = 8  # of the points: leaves no token near a tie
EMPTY = 2  # this micro-batch of each step holds padding only
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}

AVERAGE = {"codes": 24, "decay": 0.9}
LEARNED = {"codes": 24}
REPLACED = {"replace_after": 3, "replace_noise": 0.2}  # noise that sets codes of one place apart
KINDS = {
    "identity": {"kind": "identity"},
    "ema": {"kind": "ema", **AVERAGE},
    "ema-groups-replace": {"kind": "ema", "groups": 2, **AVERAGE, **REPLACED},
    "ema-no-update-0": {"kind": "ema", "count_init": 0, "update_empty": False, **AVERAGE},
    "ema-l2-small": {"kind": "ema", "normalise": "l2", "codebook_dim": 4, **AVERAGE, **REPLACED},
    "ksom-hard": {"kind": "ksom", "grid": [6, 4], **AVERAGE},
    "ksom-gaussian-groups": {"kind": "ksom", "neighbourhood": "gaussian", "groups": 2, **AVERAGE},
    "ksom-exponential-small": {
        "kind": "ksom",
        "grid": [24],
        "neighbourhood": "exponential",
        "codebook_dim": 4,
        **AVERAGE,
    },
    "rotation-replace": {"kind": "rotation", "groups": 2, **AVERAGE, **REPLACED},
    "rotation-l2-small": {"kind": "rotation", "normalise": "l2", "codebook_dim": 4, **AVERAGE},
    "gd_som-hard": {"kind": "gd_som", "grid": [6, 4], **LEARNED},
    "gd_som-gaussian": {"kind": "gd_som", "neighbourhood": "gaussian", "groups": 2, "codebook_dim": 4, **LEARNED},
    "som": {"kind": "som", "codes": 12, "steps": 9, "weight": 1.0, "reduction": "sum_over_prototypes"},
    "som-hexagonal": {"kind": "som", "codes": 12, "steps": 9, "weight": 9.0, "topology": "hexagonal"},
    "simvq": {"kind": "simvq", "groups": 2, **LEARNED},
    "simvq-l2-small": {"kind": "simvq", "normalise": "l2", "codebook_dim": 4, **LEARNED},
    "ste": {"kind": "ste", "sync_nu": 0.1, **LEARNED},
    "ste-l2-replace": {"kind": "ste", "normalise": "l2", "groups": 2, **LEARNED, **REPLACED},
    "ste-small-inner-replace": {"kind": "ste", "codebook_dim": 4, "inner_steps": 2, **LEARNED, **REPLACED},
    "affine-running-replace": {"kind": "affine", "groups": 2, "affine": "running", **LEARNED, **REPLACED},
    "affine-running-inner": {"kind": "affine", "inner_steps": 3, "normalise": "l2", **LEARNED, **REPLACED},
    "affine-learned": {"kind": "affine", "affine": "learned", "affine_groups": 2, "codebook_dim": 4, **LEARNED},
    "knn-softmax": {"kind": "knn_simplex", "codes": 8, "logits": "distance", "distance": "l2"},
    "knn-gumbel": {"kind": "knn_simplex", "codes": 8, "groups": 2, "logits": "linear", "sampler": "gumbel"},
    "gumbel": {"kind": "gumbel", "codes": 24, "groups": 2, "temperature": [2.0, 0.5, 0.9]},
    "fsq": {"kind": "fsq", "levels": [5, 4, 3], "groups": 2},
    # At inverse_temperature 100, the default, this loss is so steep that the rounding error of one step (4e-9) was 1e-4
    # after 20, with no code turned: whatever trains there, parity can't be told from a defect.
    "lfq": {"kind": "lfq", "codes": 16, "groups": 2, "inverse_temperature": 10},
    "residual-ema": {"kind": "residual", "codes": 8, "levels": 3, "level": {"kind": "ema", "decay": 0.9}},
    "residual-ste-replace": {
        "kind": "residual",
        "codes": 12,
        "levels": 2,
        "codebook_dim": 4,
        "dropout": 0.3,
        "level": {"kind": "ste", "inner_steps": 2, "sync_nu": 0.1, **REPLACED},
    },
    "lfq-spherical": {"kind": "lfq", "codes": 16, "spherical": True, "commitment": 0.25, "inverse_temperature": 10},
}
LOOKING_FOR_THE_NEAREST = {"ema", "ksom", "rotation", "gd_som", "simvq", "ste", "affine"}
WITHOUT_KMEANS = {"identity", "simvq", "gumbel", "fsq", "lfq"}
WITH_FIXED_CODES = {"identity", "fsq", "lfq"}
REPLACING = [name for name, options in KINDS.items() if "replace_after" in options | options.get("level", {})]
CASES = [
    pytest.param(world_size, micro_batches, recomputed, marks=() if fast else pytest.mark.slow)
    for world_size, micro_batches, recomputed, fast in [
        (2, 4, True, True),
        (4, 4, False, True),
        (1, 4, True, False),
        (2, 4, False, False),
        (4, 4, True, False),
        (1, 16, True, False),
        (2, 16, False, False),
        (2, 16, True, False),
        (4, 16, False, False),
        (4, 16, True, False),
    ]
]
pytestmark = pytest.mark.timeout(900)  # the first test that asks for a run waits for all kinds on all its ranks
each_case = pytest.mark.parametrize(("world_size", "micro_batches", "recomputed"), CASES)


class Model(nn.Module):
    """An encoder and a quantizer, trained to reach targets; ``recomputed``: activations are made again in backward."""

    def __init__(self, options, recomputed=False):
        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        self.quantizer = build_quantizer({"dim": DIM, **options})
        self.recomputed = recomputed

    def forward(self, batch):
        inputs, mask, _ = batch
        if self.recomputed and self.training:
            return checkpoint(self.quantize, inputs, mask, use_reentrant=False)
        return self.quantize(inputs, mask)

    def quantize(self, inputs, mask):
        return self.quantizer(self.encoder(inputs), mask)


@functools.cache
def micro_batch(step, number):
    """(inputs, mask, targets) of one micro-batch, a function of its place alone, rows padded raggedly.

    Tokens are points out of POINTS; which half of those occurs changes with the steps, so that codes die. Step −1, for
    the initialisation, has them all.
    """
    generator = torch.Generator().manual_seed(1000 * step + number + 1000)
    points = 2 * torch.randn(POINTS, DIM, generator=torch.Generator().manual_seed(SEED))
    first, occurring = (0, POINTS) if step < 0 else (step // 5 * 11, POINTS // 2)
    chosen = first + torch.randint(occurring, (ROWS, FRAMES), generator=generator)
    inputs = points[chosen % POINTS]
    lengths = torch.randint(0, FRAMES + 1, (ROWS, 1), generator=generator)
    mask = torch.arange(FRAMES) < lengths
    if number == EMPTY:
        mask[:] = False
    inputs[~mask] = 1e3  # padding must not matter
    return inputs, mask, inputs.roll(1, dims=-1)


def joined(batches):
    """Several micro-batches as one."""
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def train(options, micro_batches, recomputed, join=False):
    """Train on the ranks that exist; ``join``: what a rank holds of a step's micro-batches is one micro-batch.

    Returns the state, codes by (step, micro-batch), health by step, and how near to a tie a token was.
    """
    torch.manual_seed(3)
    model = Model(options, recomputed)
    rank, world_size = collectives.rank(), collectives.world_size()
    numbers = range(rank, micro_batches, world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    sync = CodebookSync(model, optimizer=optimizer)
    if options["kind"] not in WITHOUT_KMEANS:
        initialise_codebooks(model, [micro_batch(-1, number) for number in numbers])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    codes, replaced, health = {}, 0, []
    margins = watch_margins(model) if world_size == 1 and not recomputed else []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = sum(int(micro_batch(step, number)[1].sum()) for number in range(micro_batches))
        batches = {number: micro_batch(step, number) for number in numbers}
        for number, batch in ({rank: joined(batches.values())} if join else batches).items():
            torch.manual_seed(100 * step + number)  # sampling noise belongs to the micro-batch
            output = model(batch)
            mask = batch[1]
            task = 0.1 * (output.vectors - batch[2])[mask].square().sum() / DIM
            loss = task + sum(output.losses.values()) * int(mask.sum())
            if loss.requires_grad:
                (loss / total).backward()
            codes[step, number] = output.codes
        reduce_gradients(model)
        optimizer.step()
        summary = sync.step()
        replaced += sum(quantizer.replaced for quantizer in summary.quantizers)
        health.append(summary.summary())
    sync.check_ranks_agree()
    return {
        "start": start,
        "state": model.state_dict(),
        "codes": codes,
        "replaced": replaced,
        "health": health,
        "margin": min(margins, default=torch.inf),
    }


def reduce_gradients(model):
    """Sum over ranks, all at once; a parameter that the loss did not reach has zeros."""
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    flat = collectives.all_reduce_sum(torch.cat([parameter.grad.reshape(-1) for parameter in parameters]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.reshape(parameter.shape))


def watch_margins(model):
    """A list that will hold, of each forward, the least difference of a token's squared distances to its nearest and
    second nearest code, over all groups."""
    margins = []

    @torch.no_grad()
    def look(quantizer, args):
        latents = quantizer.split_groups(quantizer.real_latents(*args)).transpose(0, 1)  # (groups, tokens, code_dim)
        if latents.shape[1]:
            distances = torch.cdist(latents.double(), quantizer.codebook().double()).square()
            nearest = distances.topk(2, dim=-1, largest=False).values
            margins.append(float((nearest[..., 1] - nearest[..., 0]).min()))

    for module in model.modules():
        if isinstance(module, Quantizer) and module.config.kind in LOOKING_FOR_THE_NEAREST:
            module.register_forward_pre_hook(look)
    return margins


def train_all(kinds, micro_batches, recomputed, join=False):
    warnings.simplefilter("ignore")  # knn_simplex warns of micro-batches with few tokens
    return {name: train(options, micro_batches, recomputed, join) for name, options in kinds.items()}


@functools.cache
def runs(world_size, micro_batches, recomputed):
    """Each rank's results of all kinds."""
    return run_ranks(train_all, world_size, KINDS, micro_batches, recomputed, timeout=850)


def assert_parity(expected, results):
    """``results``: of each rank of one run."""
    found = set()
    for actual in results:
        for key, value in expected["state"].items():
            torch.testing.assert_close(
                actual["state"][key], value, **TOLERANCE, msg=lambda text, key=key: f"{key}: {text}"
            )
        for place, codes in actual["codes"].items():
            assert torch.equal(codes, expected["codes"][place]), f"step and micro-batch {place}"
        found |= actual["codes"].keys()
        assert actual["replaced"] == expected["replaced"]
        for health, expected_health in zip(actual["health"], expected["health"], strict=True):
            assert health == pytest.approx(expected_health, rel=1e-5)
    assert found == expected["codes"].keys()


def test_every_kind_is_here():
    assert {options["kind"] for options in KINDS.values()} == set(registry.KINDS)


@each_case
@pytest.mark.parametrize("name", KINDS)
def test_more_ranks_train_the_same_codebook(name, world_size, micro_batches, recomputed):
    (expected,) = (result[name] for result in runs(1, micro_batches, False))
    assert_parity(expected, [result[name] for result in runs(world_size, micro_batches, recomputed)])


@each_case
@pytest.mark.parametrize("name", KINDS)
def test_ranks_of_one_run_agree_to_the_bit(name, world_size, micro_batches, recomputed):
    first, *others = (result[name] for result in runs(world_size, micro_batches, recomputed))
    for other in others:
        assert other["health"] == first["health"]
        for key, value in first["state"].items():
            assert torch.equal(other["state"][key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", KINDS)
def test_recomputed_activations_change_nothing(name, world_size):
    """Not even rounding: the same sums in the same order."""
    plain, recomputed = runs(world_size, 16, False)[0][name], runs(world_size, 16, True)[0][name]
    for key, value in plain["state"].items():
        assert torch.equal(recomputed["state"][key], value), key


@pytest.mark.parametrize("name", REPLACING)
@pytest.mark.parametrize("micro_batches", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_codes_were_replaced(name, micro_batches):
    assert runs(1, micro_batches, False)[0][name]["replaced"] > 0


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name]["kind"] not in WITHOUT_KMEANS])
def test_codes_began_as_those_of_k_means(name):
    torch.manual_seed(3)
    options = KINDS[name]
    before, started = Model(options), Model(options)
    started.load_state_dict(runs(1, 4, False)[0][name]["start"])
    assert (started.quantizer.codebook() - before.quantizer.codebook()).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name]["kind"] not in WITH_FIXED_CODES])
def test_training_moved_the_codebooks(name):
    """Parity of codebooks that stood still would say nothing."""
    result = runs(1, 4, False)[0][name]
    before, after = Model(KINDS[name]), Model(KINDS[name])
    before.load_state_dict(result["start"])
    after.load_state_dict(result["state"])
    assert (after.quantizer.codebook() - before.quantizer.codebook()).abs().max() > 1e-2


@pytest.mark.parametrize("micro_batches", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_no_token_is_near_a_tie(micro_batches):
    """Else a rounding error could turn its code, and parity would be a matter of luck."""
    margins = {name: result["margin"] for name, result in runs(1, micro_batches, False)[0].items()}
    assert sum(margin < torch.inf for margin in margins.values()) >= len(LOOKING_FOR_THE_NEAREST)
    assert min(margins.values()) > TOLERANCE["atol"], margins


GLOBAL = {
    f"{distance}-{logits}": {
        "kind": "knn_simplex",
        "codes": 6,
        "groups": 2,
        "scope": "global",
        "neighbours": 3,
        "distance": distance,
        "logits": logits,
    }
    for distance, logits in [("cross_entropy", "dot"), ("l2", "distance"), ("l2", "linear")]
}


def test_global_neighbours_train_as_one_process_with_the_joint_batch():
    """scope=global is over the micro-batches that ranks hold at one time: here one a rank and step, of 4 in all."""
    (expected,) = run_ranks(train_all, 1, GLOBAL, 4, False, True)
    for world_size, recomputed in ((2, False), (4, True)):
        for actual in run_ranks(train_all, world_size, GLOBAL, 4, recomputed, True):
            for name in GLOBAL:
                for key, value in expected[name]["state"].items():
                    torch.testing.assert_close(actual[name]["state"][key], value, **TOLERANCE)


GLOBAL_TERMS = {
    "cross_entropy": {"kind": "knn_simplex", "codes": 8, "groups": 2, "neighbours": 3, "distance": "cross_entropy"},
    "l2": {"kind": "knn_simplex", "codes": 8, "groups": 2, "neighbours": 3, "distance": "l2"},
    "diversity": {"kind": "gumbel", "codes": 8, "groups": 2},
    "entropy": {"kind": "lfq", "codes": 8, "groups": 2, "inverse_temperature": 1},
}


def _global_terms(world_size):
    """Each term, none of which has sampling noise, and its gradients: for this rank's share of twelve rows,
    token-weighted and summed over ranks."""
    results = {}
    for name, options in GLOBAL_TERMS.items():
        torch.manual_seed(0)
        quantizer = build_quantizer({"dim": DIM, "scope": "global", **options})
        latents = torch.randn(12, 5, DIM)
        latents[3] = latents[2]  # equal tokens on one rank and on two: ties
        latents[4:6] = latents[2]
        mask = torch.rand(12, 5) > 0.4
        mask[8:] = False  # on 3 ranks the last one is empty
        rows = torch.arange(12).chunk(world_size)[collectives.rank()]
        output = quantizer(latents[rows], mask[rows])
        loss = sum(output.losses.values()) * (mask[rows].sum() / mask.sum())
        loss.backward()
        reduce_gradients(quantizer)
        gradients = [parameter.grad for parameter in quantizer.parameters()]
        assert any(bool(gradient.any()) for gradient in gradients)
        results[name] = [collectives.all_reduce_sum(loss.detach()), *gradients]
    return results


def test_global_terms_and_their_gradients_are_those_of_the_joint_batch():
    (expected,) = run_ranks(_global_terms, 1, 1)
    for world_size in (2, 3):
        for actual in run_ranks(_global_terms, world_size, world_size):
            for name, values in expected.items():
                for found, value in zip(actual[name], values, strict=True):
                    torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-4)
