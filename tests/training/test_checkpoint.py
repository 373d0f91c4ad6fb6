"""Checkpoints on real ranks under real DeepSpeed: any layout reads any other's, bit for bit; damage, full disks, what
stays."""

import itertools
import logging
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.quantizers import build_quantizer
from pipeline.training.average import WeightAverage, decay_after
from pipeline.training.checkpoint import (
    CheckpointError,
    CheckpointReader,
    checkpoint_name,
    find_latest,
    list_checkpoints,
    load_checkpoint,
    read_manifest,
    read_weights,
)
from pipeline.training.checkpoint_writer import CheckpointWriter, Retention
from tests.distributed.harness import run_ranks

STAGES = (0, 1, 2, 3)
STEPS = 3
DECAY = 0.2


class Model(nn.Module):
    """Odd sizes, a frozen layer, one that nothing uses, learned codes and codes in buffers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 7)
        self.frozen = nn.Linear(7, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(6)
        self.averaged = build_quantizer({"kind": "ema", "dim": 6, "codes": 9})
        self.learned = build_quantizer({"kind": "ste", "dim": 6, "codes": 11})

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        latents = self.norm(self.frozen(self.first(inputs)))
        outputs = self.averaged(latents), self.learned(latents)
        return sum(output.vectors.square().sum() + sum(output.losses.values()) for output in outputs)


def _engine(stage, seed, **optimizer_options):
    from pipeline import collectives
    from pipeline.codebooks import CodebookSync
    from pipeline.training.config import EngineConfig, OptimizerConfig
    from pipeline.training.engine import engine_settings, import_deepspeed
    from pipeline.training.loss_scale import finish_gradients
    from pipeline.training.optimizer import build_optimizer

    warnings.simplefilter("ignore")
    logging.getLogger("tessera").setLevel(logging.ERROR)
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = Model(seed)
    optimizer = build_optimizer(model, OptimizerConfig(**{"learning_rate": 0.01} | optimizer_options))
    sync = CodebookSync(model, optimizer=optimizer)
    settings = engine_settings(EngineConfig(zero_stage=stage), 1, 200)
    # Some of these small parameters stay whole under ZeRO 3, others are partitioned.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 20
    if stage == 0:
        finish_gradients(optimizer, 1.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return engine, sync, collectives.rank()


def _advance(engine, sync, rank, steps, poison=(), average=None):
    applied = []
    for step in steps:
        torch.manual_seed(10 * step + rank)
        inputs = torch.randn(8, 5)
        loss = engine(inputs)
        engine.backward(loss * float("nan") if (step, rank) in poison else loss)
        engine.step()
        applied.append(engine.was_step_applied())
        if applied[-1]:
            sync.step()
            if average is not None:
                average.update(step)
        else:
            sync.discard()
    return applied


def _facts(stage, loss=None):
    return {
        "zero_stage": stage,
        "precision": "fp32",
        "loss": loss,
        "data_fingerprint": "",
        "codebook_checksum": "",
    }


def _save_all(folder):
    for stage in STAGES:
        engine, sync, rank = _engine(stage, seed=0)
        average = WeightAverage(engine, DECAY)
        expected = {}
        for step in range(STEPS):
            weights = _whole_weights(engine)
            expected = expected or weights
            _advance(engine, sync, rank, [step], average=average)
            share = 1 - min(DECAY, (1 + step) / (10 + step))
            for name, after in _whole_weights(engine).items():
                expected[name] = (1 - share) * expected[name] + share * after
        if rank == 0:
            torch.save(expected, Path(folder) / f"average-{stage}")
        writer = CheckpointWriter(Path(folder) / str(stage), Retention(1), average=average)
        writer.save_and_wait(engine, STEPS, _facts(stage))


def _whole_weights(engine):
    """fp64, from all ranks."""
    from pipeline.codebooks.engine_parameters import gathered

    with gathered(list(engine.module.parameters())):
        return {name: parameter.detach().double().clone() for name, parameter in engine.module.named_parameters()}


def _convert(folder, pairs):
    """Load each source stage's checkpoint under another stage into other weights, and save it at once."""
    for source, stage in pairs:
        engine, *_ = _engine(stage, seed=1)
        average = WeightAverage(engine, DECAY)
        load_checkpoint(engine, Path(folder) / str(source) / checkpoint_name(STEPS), average)
        target = Path(folder) / f"{source}-{stage}"
        CheckpointWriter(target, Retention(1), average=average).save_and_wait(engine, STEPS, _facts(stage))


def _contents(checkpoint):
    with CheckpointReader(checkpoint) as reader:
        found = reader.buffers()
        for name, shape in reader.manifest.parameters.items():
            for part in ("weight", "average", "exp_avg", "exp_avg_sq"):
                values = reader.read(name, part, 0, math.prod(shape))
                # Where an optimiser has seen no gradient, ZeRO keeps zeros and torch keeps nothing.
                if values is not None and (part == "weight" or values.any()):
                    found[f"{part} {name}"] = values
        return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(_save_all, 2, str(folder), timeout=240)
    return folder


def _check_conversions(folder, ranks, pairs):
    run_ranks(_convert, ranks, str(folder), pairs, timeout=280)
    for source, stage in pairs:
        original = folder / str(source) / checkpoint_name(STEPS)
        converted = folder / f"{source}-{stage}" / checkpoint_name(STEPS)
        expected, actual = _contents(original), _contents(converted)
        assert expected.keys() == actual.keys()
        for name, values in expected.items():
            assert torch.equal(values, actual[name]), (source, stage, name)
        assert sum(name.startswith("exp_avg ") for name in expected) == 5  # all that has a gradient
        assert sum(name.startswith("average ") for name in expected) == 7  # and what is not frozen
        steps = read_manifest(original).optimizer_steps, read_manifest(converted).optimizer_steps
        assert {steps[1][name] for name in steps[0]} == {STEPS}


@pytest.mark.parametrize("ranks", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_layout_of_ranks_reads_every_bit(saved, ranks):
    _check_conversions(saved, ranks, [(stage, (stage + ranks) % 4) for stage in STAGES])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_all_layouts_read_one_another(saved, ranks):
    _check_conversions(saved, ranks, list(itertools.product(STAGES, STAGES)))


def test_weights_are_those_of_the_ranks(saved):
    states = [read_weights(saved / str(stage) / checkpoint_name(STEPS), raw=True) for stage in STAGES]
    assert states[0].keys() == Model(0).state_dict().keys()
    for state in states[1:]:
        for name, values in states[0].items():
            torch.testing.assert_close(state[name], values, atol=1e-6, rtol=1e-5, msg=name)
    assert torch.equal(states[0]["frozen.weight"], Model(0).frozen.weight)
    assert int(states[0]["averaged.updates"]) == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_that_of_whole_weights_and_what_is_read(saved, stage):
    checkpoint = saved / str(stage) / checkpoint_name(STEPS)
    averaged, raw = read_weights(checkpoint), read_weights(checkpoint, raw=True)
    expected = torch.load(saved / f"average-{stage}")
    for name, values in averaged.items():
        if name in expected:
            torch.testing.assert_close(values.double(), expected[name], atol=1e-7, rtol=1e-6, msg=name)
        else:
            assert torch.equal(values, raw[name]), "state of codebooks is as it is"
    assert not torch.equal(averaged["first.weight"], raw["first.weight"])
    assert torch.equal(averaged["frozen.weight"], raw["frozen.weight"])


def test_the_average_of_a_short_run_is_not_its_beginning():
    assert [decay_after(steps, 0.999) for steps in (0, 10, 8990, 10**6)] == [0.1, 0.55, 0.999, 0.999]
    assert decay_after(0, 0.05) == 0.05


def _momentum_goes_on(folder):
    """Whether SGD's steps after a checkpoint are those without it, by stage."""
    found = {}
    for stage in STAGES:
        sgd = {"kind": "sgd", "momentum": 0.9, "learning_rate": 1e-3}
        engine, sync, rank = _engine(stage, seed=0, **sgd)
        _advance(engine, sync, rank, range(STEPS))
        writer = CheckpointWriter(Path(folder) / str(stage), Retention(1))
        writer.save_and_wait(engine, STEPS, _facts(stage))
        resumed, its_sync, _ = _engine(stage, seed=1, **sgd)
        load_checkpoint(resumed, Path(folder) / str(stage) / checkpoint_name(STEPS))
        for each, of_each in ((engine, sync), (resumed, its_sync)):
            _advance(each, of_each, rank, [STEPS, STEPS + 1])
        weights = _whole_weights(engine), _whole_weights(resumed)
        found[stage] = {name: torch.equal(values, weights[1][name]) for name, values in weights[0].items()}
    return found


def test_momentum_goes_on_after_a_resume(tmp_path):
    for found in run_ranks(_momentum_goes_on, 2, str(tmp_path), timeout=240):
        assert all(same for of_stage in found.values() for same in of_stage.values()), found


def _load_another_model(folder):
    from pipeline.training.engine_state import parameter_shapes

    engine, *_ = _engine(0, seed=0)
    engine.module.first = nn.Linear(5, 8)
    assert parameter_shapes(engine.module)["first.weight"] == [8, 5]
    with pytest.raises(CheckpointError, match=r"first.bias has shape \[7\] there and \[8\] here"):
        load_checkpoint(engine, Path(folder) / "0" / checkpoint_name(STEPS))


def test_a_checkpoint_of_another_model_is_refused(saved):
    run_ranks(_load_another_model, 1, str(saved))


def _poisoned(folder):
    """One rank's gradient is not a number in step 1: what each stage makes of steps 0, 1 and 2."""
    found = {}
    for stage in STAGES:
        engine, sync, rank = _engine(stage, seed=0)
        applied = _advance(engine, sync, rank, range(STEPS), poison={(1, 0)})
        writer = CheckpointWriter(Path(folder) / str(stage), Retention(1))
        writer.save_and_wait(engine, STEPS, _facts(stage))
        found[stage] = applied, int(engine.module.averaged.updates)
    return found


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(tmp_path):
    ranks = run_ranks(_poisoned, 2, str(tmp_path), timeout=240)
    assert ranks[0] == ranks[1] == dict.fromkeys(STAGES, ([True, False, True], STEPS - 1))
    states = [read_weights(tmp_path / str(stage) / checkpoint_name(STEPS)) for stage in STAGES]
    for state in states:
        assert all(bool(torch.isfinite(values).all()) for values in state.values())
        for name, values in states[0].items():
            torch.testing.assert_close(state[name], values, atol=1e-6, rtol=1e-5, msg=name)


def _keep(folder):
    engine, sync, rank = _engine(1, seed=0)
    losses = [5.0, 1.0, 3.0, 4.0, 2.5, 2.0]
    writer = CheckpointWriter(Path(folder), Retention(newest=2, every=3, best=True))
    for step, loss in enumerate(losses, start=1):
        _advance(engine, sync, rank, [step])
        writer.save(engine, step, _facts(1, loss))  # ends the one before
    writer.commit()
    writer.save_and_wait(engine, 6, _facts(1, 0.5))  # the same step again: the whole one stays
    return read_manifest(Path(folder) / checkpoint_name(6)).loss


def test_the_newest_the_best_and_every_nth_stay(tmp_path):
    assert run_ranks(_keep, 1, str(tmp_path)) == [2.0]
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(step) for step in (2, 3, 5, 6)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint_name(step) for step in (2, 3, 5, 6)]


def _fill_up(folder):
    """The kernel refuses files beyond a size, as a full disk would, on rank 1 alone; then there is room again."""
    import resource
    import signal

    from pipeline.training import checkpoint_writer

    checkpoint_writer.WAIT_BETWEEN = 0.01
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    engine, sync, rank = _engine(1, seed=0)
    writer = CheckpointWriter(Path(folder), Retention(3))
    writer.save_and_wait(engine, 1, _facts(1))
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, unlimited[1]))
    _advance(engine, sync, rank, [1])
    writer.save(engine, 2, _facts(1))
    results = [writer.commit()]
    left = sorted(path.name for path in Path(folder).iterdir())
    with pytest.raises(CheckpointError, match=r"step 2 can't be written into .*: make room there"):
        writer.save_and_wait(engine, 2, _facts(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    writer.save(engine, 2, _facts(1))
    results.append(writer.commit())
    return results, left


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(tmp_path):
    for results, left in run_ranks(_fill_up, 2, str(tmp_path)):
        assert results == [False, True]
        assert left == [checkpoint_name(1)]
    assert find_latest(tmp_path) == (tmp_path / checkpoint_name(2), [])
