"""Codebooks of every kind inside the engine that trains them: real DeepSpeed, 2 ranks, every ZeRO stage and precision.

One model holds a quantizer of each kind. It trains under the engine as the loop does, with gradient accumulation,
k-means initialisation, replacement and inner steps, and is compared with the same model under plain torch in one
process, which differs by the order of sums (tests/distributed/test_parity.py). In both precisions: in bf16 weights,
gradients and sums over ranks are fp32 too, and a matrix product of the same bf16 numbers is the same anywhere. The
largest error measured was 3.8e-6, in sums of some units; TOLERANCE is five times that.

What the stages do to codebook state, which these tests pin down:

- buffers (moving averages, counts, running statistics, numbers of steps) are whole and fp32 or integers on every rank
  at every stage; no configuration of ours casts them;
- learned codes are fp32 parameters at every stage in both precisions, since bf16 is torch's autocast. ZeRO 0, 1 and 2
  keep them whole on every rank; ZeRO 3 keeps a part of each on each rank and gathers it in the forward of the module
  that reads it, so ``codebook()``, ``encode`` and ``decode`` work everywhere, when all ranks call them.
"""

import functools
import warnings

import pytest
import torch
from torch import nn

from tests.distributed import test_parity as parity
from tests.distributed.harness import run_ranks

STEPS, MICRO_BATCHES, RANKS = 6, 4, 2
LATER = 2  # steps after the checkpoint
TOLERANCE = {"atol": 2e-5, "rtol": 2e-5}
FAST = [(1, "fp32"), (3, "bf16")]
SLOW = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32")]
each_case = pytest.mark.parametrize(
    "case",
    [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)],
    ids=lambda case: "ZeRO {} {}".format(*case),
)
PRECISIONS = ["fp32", "bf16"]
KINDS = {
    name: options | ({"replace_after": 2} if "replace_after" in options else {})
    for name, options in parity.KINDS.items()
}
LEARNED = "weight"  # in the names of learned codes and heads


class Model(nn.Module):
    """An encoder and quantizers of all kinds; gives the loss that tests/distributed/test_parity.py trains with."""

    def __init__(self):
        from pipeline.quantizers import build_quantizer

        super().__init__()
        # No bias: ZeRO 3's own linear rounds the product and the sum each to bf16, torch's only the sum.
        self.encoder = nn.Linear(parity.DIM, parity.DIM, bias=False)
        self.quantizers = nn.ModuleDict(
            {name: build_quantizer({"dim": parity.DIM, **options}) for name, options in KINDS.items()}
        )

    def forward(self, batch):
        inputs, mask, targets = batch
        latents = self.encoder(inputs)
        tokens = int(mask.sum())
        losses = []
        for quantizer in self.quantizers.values():
            output = quantizer(latents, mask)
            task = 0.1 * (output.vectors.float() - targets)[mask].square().sum() / parity.DIM
            losses.append(task + sum(output.losses.values()) * tokens)
        return torch.stack(losses).sum()


def build(seed):
    from pipeline.codebooks import CodebookSync

    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    return model, optimizer, CodebookSync(model, optimizer=optimizer)


def initialise(model, numbers):
    from pipeline.codebooks import initialise_codebooks

    class Reached(nn.ModuleDict):
        """The encoder and the kinds that k-means can initialise."""

        def forward(self, batch):
            for quantizer in self["quantizers"].values():
                quantizer(model.encoder(batch[0]), batch[1])

    kinds = {
        name: quantizer
        for name, quantizer in model.quantizers.items()
        if quantizer.config.kind not in parity.WITHOUT_KMEANS
    }
    initialise_codebooks(
        Reached({"quantizers": nn.ModuleDict(kinds)}), [parity.micro_batch(-1, number) for number in numbers]
    )


def targets_of(step):
    return sum(int(parity.micro_batch(step, number)[1].sum()) for number in range(MICRO_BATCHES))


def train_plain(precision):
    """All micro-batches in one process with a torch optimiser; state, codebooks and how many codes were replaced."""
    warnings.simplefilter("ignore")
    model, optimizer, sync = build(0)
    initialise(model, range(MICRO_BATCHES))
    replaced = 0
    for step in range(STEPS):
        optimizer.zero_grad()
        for number in range(MICRO_BATCHES):
            torch.manual_seed(100 * step + number)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = model(parity.micro_batch(step, number))
            (loss / targets_of(step)).backward()
        optimizer.step()
        replaced += sum(quantizer.replaced for quantizer in sync.step().quantizers)
    return {"state": model.state_dict(), "codebooks": codebooks(model), "replaced": replaced}


def codebooks(model):
    return {name: quantizer.codebook().clone() for name, quantizer in model.quantizers.items()}


def whole_state(model):
    """The quantizers' state dicts, with parameters that ZeRO 3 has partitioned made whole."""
    from pipeline.training.engine import import_deepspeed

    zero = import_deepspeed().zero
    parameters = list(model.quantizers.parameters())
    with zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")]):
        return {name: tensor.detach().clone() for name, tensor in model.quantizers.state_dict().items()}


def train_under_the_engine(cases, folder):
    """The loop's steps on the ranks that exist, for each (stage, precision), with a checkpoint in the middle."""
    from pathlib import Path

    from pipeline.training.engine import import_deepspeed

    warnings.simplefilter("ignore")
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return {case: train_case(*case, Path(folder) / "{}-{}".format(*case)) for case in cases}


def train_case(stage, precision, folder):
    from pipeline import collectives
    from pipeline.training.checkpoint import checkpoint_name, load_checkpoint, read_weights
    from pipeline.training.checkpoint_writer import CheckpointWriter, Retention
    from pipeline.training.config import EngineConfig
    from pipeline.training.engine import engine_settings, import_deepspeed

    rank, world_size = collectives.rank(), collectives.world_size()
    numbers = range(rank, MICRO_BATCHES, world_size)
    config = EngineConfig(zero_stage=stage, precision=precision, gradient_clipping=0)

    def start(seed):
        model, optimizer, sync = build(seed)
        if seed == 0:
            initialise(model, numbers)
        before = {name: tensor.clone() for name, tensor in model.quantizers.state_dict().items()}
        settings = engine_settings(config, MICRO_BATCHES // world_size, sum(p.numel() for p in model.parameters()))
        # By default ZeRO 3 keeps small parameters whole, and all of these are small.
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        engine, *_ = import_deepspeed().initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        return engine, sync, before

    def advance(engine, sync, steps):
        replaced = 0
        for step in steps:
            for number in numbers:
                torch.manual_seed(100 * step + number)
                loss = engine(parity.micro_batch(step, number))
                engine.backward(loss * (world_size / targets_of(step)), scale_wrt_gas=False)
                engine.step()
            replaced += sum(quantizer.replaced for quantizer in sync.step().quantizers)
        sync.check_ranks_agree()
        return replaced

    engine, sync, before = start(0)
    result = {"before": before, "created": whole_state(engine.module)}
    result["replaced"] = advance(engine, sync, range(STEPS))
    module = engine.module
    result["held"] = {name: tuple(parameter.shape) for name, parameter in module.quantizers.named_parameters()}
    result["dtypes"] = {
        name: getattr(parameter, "ds_tensor", parameter).dtype
        for name, parameter in module.quantizers.named_parameters()
    }
    result["dtypes"] |= {name: buffer.dtype for name, buffer in module.quantizers.named_buffers()}
    result["state"], result["codebooks"] = whole_state(module), codebooks(module)
    result["outside"] = outside_of_forward(module)

    facts = {"data_fingerprint": "", "codebook_checksum": sync.checksum(), "loss": None}
    CheckpointWriter(folder, Retention(1)).save_and_wait(
        engine, STEPS, {"zero_stage": stage, "precision": precision, **facts}
    )
    checkpoint = folder / checkpoint_name(STEPS)
    result["checksums"] = [sync.checksum()]
    advance(engine, sync, range(STEPS, STEPS + LATER))
    result["later"] = whole_state(module)

    engine, sync, _ = start(1)  # other weights, other codebooks
    load_checkpoint(engine, checkpoint)
    result["checksums"].append(sync.checksum())
    result["restored"] = whole_state(engine.module)
    advance(engine, sync, range(STEPS, STEPS + LATER))
    result["later again"] = whole_state(engine.module)
    if rank == 0:
        weights = read_weights(checkpoint)
        result["exported"] = {
            name.removeprefix("quantizers."): tensor
            for name, tensor in weights.items()
            if name.startswith("quantizers.")
        }
    collectives.barrier()
    return result


def outside_of_forward(module):
    """Codes and vectors of the trained model in evaluation, from forward and from encode and decode."""
    inputs, mask, _ = parity.micro_batch(0, 0)
    module.eval()
    with torch.no_grad():
        latents = inputs.clone()
        found = {}
        for name, quantizer in module.quantizers.items():
            output = quantizer(latents, mask)
            codes = quantizer.encode(latents, mask)
            decoded = quantizer.decode(codes) if quantizer.config.kind != "identity" else output.vectors
            found[name] = (output.codes, output.vectors, codes, decoded)
    module.train()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def results(case, folder):
    return [rank[case] for rank in engine_runs(tuple(FAST if case in FAST else SLOW), folder)]


@functools.cache
def engine_runs(cases, folder):
    return run_ranks(train_under_the_engine, RANKS, list(cases), folder, timeout=280)


@functools.cache
def plain_run(precision):
    (result,) = run_ranks(train_plain, 1, precision)
    return result


def assert_bit_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@each_case
def test_the_engine_starts_with_the_codebooks_it_was_given(results):
    for result in results:
        assert_bit_equal(result["created"], result["before"])


@each_case
def test_codebook_state_is_fp32(results):
    for result in results:
        assert set(result["dtypes"].values()) <= {torch.float32, torch.int64, torch.bool}
        for name, tensor in result["state"].items():
            if LEARNED in name or "code_vectors" in name:
                assert tensor.dtype == torch.float32, name
        # a value that went through bf16 on the way would have lost its last 16 bits
        learned = result["codebooks"]["ste"]
        assert not torch.equal(learned, learned.bfloat16().float())


@each_case
def test_the_engine_trains_the_codebooks_that_plain_torch_trains(results, case):
    plain = plain_run(case[1])
    for result in results:
        assert result["replaced"] == plain["replaced"] > 0
        for name, tensor in plain["state"].items():
            if name.startswith("quantizers."):
                actual = result["state"][name.removeprefix("quantizers.")]
                torch.testing.assert_close(actual, tensor, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@each_case
def test_training_moved_every_codebook(results):
    before, after = results[0]["before"], results[0]["state"]
    for name in KINDS:
        moved = [key for key in before if key.startswith(f"{name}.") and not torch.equal(before[key], after[key])]
        assert moved, name
        if f"{name}.code_vectors.weight" in before:
            assert f"{name}.code_vectors.weight" in moved


@each_case
def test_ranks_hold_the_same_bits(results):
    first, *others = results
    for other in others:
        for what in ("created", "state", "codebooks", "restored", "later"):
            assert_bit_equal(other[what], first[what])


@each_case
def test_learned_codes_are_partitioned_by_zero_3_only_and_read_whole(results, case):
    for result in results:
        held = {shape for name, shape in result["held"].items()}
        assert held == {(0,)} if case[0] == 3 else (0,) not in held
        for name, codebook in result["codebooks"].items():
            codes = KINDS[name].get("codes", 0)
            assert codebook.shape[1] == codes or KINDS[name]["kind"] not in ("ste", "affine", "knn_simplex", "gumbel")
            codes_of_forward, vectors, encoded, decoded = result["outside"][name]
            assert torch.equal(codes_of_forward, encoded), name
            if KINDS[name]["kind"] != "som":  # its vectors are the latents
                close = {"atol": 1e-6, "rtol": 1e-6}
                torch.testing.assert_close(decoded, vectors, **close, msg=lambda text, name=name: name + text)


@each_case
def test_a_checkpoint_restores_every_bit(results):
    for result in results:
        assert len(set(result["checksums"])) == 1
        assert_bit_equal(result["restored"], result["state"])


@each_case
def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_been(results):
    for result in results:
        assert_bit_equal(result["later again"], result["later"])
        assert any(not torch.equal(result["later"][name], result["state"][name]) for name in result["state"])


@each_case
def test_weights_for_others_hold_the_codebooks_bit_for_bit(results):
    assert_bit_equal(results[0]["exported"], results[0]["state"])
