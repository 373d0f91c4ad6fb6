"""The engine's options on real ranks: gradients are those of one process, fp16's loss scale, activations computed
twice."""

import functools
import shutil

import pytest
import torch

from pipeline.training.config import EngineConfig
from tests.distributed.harness import run_ranks
from tests.models import speech
from tests.training.engine_steps import (
    SPEECH_LENGTHS,
    STEP_MICRO_BATCHES,
    assert_gradients,
    build,
    gradients,
    image_batch,
    joined,
    micro_batch,
    take_all,
)

KINDS = ("image", "speech")
STAGES = (0, 1, 2, 3)
CASES = [
    pytest.param(kind, stage, marks=[pytest.mark.slow] if kind == "speech" else [])
    for kind in KINDS
    for stage in STAGES
]
DROPOUT = {"image": {}, "speech": {"dropout": 0.1, "attention_dropout": 0.1, "layer_drop": 0.3}}


@functools.cache
def gradient_runs(kind, ranks):
    """All stages of a kind: each start of processes costs seconds."""
    cases = [(kind, {"zero_stage": stage, "gradient_clipping": 0}, 1, {}) for stage in STAGES]
    return run_ranks(take_all, ranks, cases, timeout=280)


@functools.cache
def joint_gradients(kind):
    """Plain torch, one forward and backward of all samples of the step."""
    torch.manual_seed(0)
    model = build(kind)
    parts = [micro_batch(kind, 0, number) for number in range(STEP_MICRO_BATCHES)]
    if kind == "image":
        batch = image_batch(torch.cat([part.pixels for part in parts]))
    else:
        batch = speech.join_batches(parts)
    assert batch.targets == sum(part.targets for part in parts)
    output = model(batch)
    (sum(output.losses.values()) / batch.targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("kind", "stage"), CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_those_of_one_process_on_the_joint_batch(ranks, kind, stage):
    assert len({len(lengths) for lengths in SPEECH_LENGTHS}) > 1, "a mean of micro-batches' means must be wrong"
    assert_gradients(gradients([rank[stage] for rank in gradient_runs(kind, ranks)]), joint_gradients(kind))


@functools.cache
def recomputed_runs(kind):
    cases = [
        (kind, {"zero_stage": stage, "activation_checkpointing": again}, 2, DROPOUT[kind])
        for stage in STAGES
        for again in (False, True)
    ]
    return run_ranks(take_all, 2, cases, timeout=280)


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_activations_computed_twice_change_no_bit(kind, stage):
    for rank in recomputed_runs(kind):
        kept, again = rank[2 * stage], rank[2 * stage + 1]
        assert kept["losses"] == again["losses"]
        for before, after in zip(kept["pieces"], again["pieces"], strict=True):
            assert before[:3] == after[:3]
            assert torch.equal(before[3], after[3]), before[:3]


@functools.cache
def fp16_runs(kind):
    cases = [
        (kind, {"zero_stage": stage, "precision": precision}, 4, {"poison": (1, 2)})
        for stage in STAGES
        for precision in ("fp16", "fp32")
    ]
    return run_ranks(take_all, 2, cases, timeout=280)


@pytest.mark.parametrize(("kind", "stage"), CASES)
def test_fp16_trains_as_fp32_does_and_halves_its_scale_at_an_overflow(kind, stage):
    half, full = ([rank[place] for rank in fp16_runs(kind)] for place in (2 * stage, 2 * stage + 1))
    for rank in half:
        assert rank["applied"] == [True, False, False, True]
        assert rank["scales"] == [2.0**10, 2.0**10, 2.0**9, 2.0**8, 2.0**8]
        assert rank["buffers"] <= {torch.float32}
        assert {values.dtype for _, _, _, values in rank["pieces"]} == {torch.float32}
    assert half[0]["losses"] != full[0]["losses"], "half precision must have been used"
    for key, loss in full[0]["losses"].items():
        assert half[0]["losses"][key] == pytest.approx(loss, rel=1e-2)
    # The norm is of gradients without the scale, and so is what is clipped.
    assert full[0]["norm"] > 0
    assert half[0]["norm"] == pytest.approx(full[0]["norm"], rel=5e-2)
    moments = joined(half, "exp_avg"), joined(full, "exp_avg")
    assert moments[0].keys() == moments[1].keys()
    for name, expected in moments[1].items():
        difference = (moments[0][name] - expected).norm()
        assert difference <= 0.1 * expected.norm() + 1e-6, name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_the_same():
    cases = [
        ("image", {"zero_stage": stage, "compile": compiled}, 2, {}) for stage in (0, 3) for compiled in (False, True)
    ]
    cases.append(("image", {"zero_stage": 1, "compile": True, "activation_checkpointing": True}, 2, {}))
    (results,) = run_ranks(take_all, 1, cases, timeout=900)
    plain, *others = results
    for other in others:
        assert other["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        moments, expected = joined([other], "exp_avg"), joined([plain], "exp_avg")
        for name, values in expected.items():
            # Fused kernels add in another order.
            torch.testing.assert_close(
                moments[name],
                values,
                rtol=1e-3,
                atol=1e-5 * float(values.abs().max()) + 1e-9,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def longest_wait(seconds):
    from pipeline.training.engine import build_engine, join_process_group

    join_process_group(seconds)
    model = torch.nn.Linear(2, 2)
    engine, _ = build_engine(model, torch.optim.AdamW(model.parameters()), EngineConfig(), accumulation=1)
    group = engine.data_parallel_group._get_backend(torch.device("cpu"))
    return group.options._timeout.total_seconds()


@pytest.mark.slow
def test_no_rank_waits_longer_for_gradients_than_for_anything_else():
    assert run_ranks(longest_wait, 2, 17) == [17, 17]
