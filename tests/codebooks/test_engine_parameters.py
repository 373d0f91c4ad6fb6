"""Codebooks inside engines that Tessera does not configure, on two ranks: DeepSpeed's own bf16 mode, and its casts.

A learned codebook that is written beside the engine's master copy is back where it was after the next step. Under the
engine as Tessera builds it: tests/distributed/test_deepspeed_codebooks.py.
"""

import functools
import tempfile

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks

DIM, CODES = 6, 9
QUANTIZERS = {
    "followed": {"kind": "ema", "replace_after": 2},
    "learned": {"kind": "ste", "replace_after": 2},
    "alternating": {"kind": "ste", "codebook_dim": 4, "inner_steps": 5, "inner_rate": 0.5},
}


class Model(nn.Module):
    def __init__(self):
        from pipeline.quantizers import build_quantizer

        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        for name, options in QUANTIZERS.items():
            self.add_module(name, build_quantizer({"dim": DIM, "codes": CODES, **options}))

    def forward(self, inputs):
        latents = self.encoder(inputs)
        return sum(sum(getattr(self, name)(latents).losses.values()) for name in QUANTIZERS)


def _start(stage, settings):
    """Model, engine and sync on the ranks that exist; most codes of two quantizers far from everything: these die."""
    from pipeline.codebooks import CodebookSync
    from pipeline.training.engine import import_deepspeed

    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.learned.code_vectors.weight[0, CODES // 2 :] += 100
        far = model.followed.codebook().clone()
        far[0, CODES // 2 :] += 100
        model.followed.set_codebook(far)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    sync = CodebookSync(model, optimizer=optimizer)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
            **settings,
        },
        dist_init_required=False,
    )
    return engine, sync


def _step(engine, sync, number):
    from pipeline import collectives

    inputs = torch.randn(40, DIM, generator=torch.Generator().manual_seed(10 * number + collectives.rank()))
    loss = engine(inputs.to(next(engine.module.encoder.parameters()).dtype))
    engine.backward(loss)
    engine.step()
    return sync.step()


def _codebooks(module):
    return {name: getattr(module, name).codebook().clone() for name in QUANTIZERS}


def _train(cases):
    return {case: _train_case(*case) for case in cases}


def _train_case(stage, precision):
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from pipeline import collectives

    engine, sync = _start(stage, {"bf16": {"enabled": precision == "bf16"}})
    replaced, codebooks = [], [_codebooks(engine.module)]
    for number in range(4):
        health = _step(engine, sync, number)
        replaced.append({quantizer.name: quantizer.replaced for quantizer in health.quantizers})
        codebooks.append(_codebooks(engine.module))
    sync.check_ranks_agree()
    result = {
        "replaced": replaced,
        "codebooks": codebooks,
        "buffers": {name: buffer.dtype for name, buffer in engine.module.named_buffers()},
    }
    if stage == 0:
        return result
    result["masters"] = {
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters()
        if not name.startswith("encoder")
    }
    folder = collectives.all_gather_objects(tempfile.mkdtemp())[0]
    engine.save_checkpoint(folder)
    collectives.barrier()
    result["saved"] = get_fp32_state_dict_from_zero_checkpoint(folder) if collectives.rank() == 0 else {}
    return result


CASES = [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


@functools.cache
def _results():
    return run_ranks(_train, 2, CASES, timeout=280)


@pytest.fixture(scope="module")
def results():
    return _results()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replaced_codes_survive_the_engines_next_steps(results, case):
    for result in (rank[case] for rank in results):
        codebooks = result["codebooks"][1:]
        assert set(result["replaced"][0].values()) == {0}
        for name in ("followed", "learned"):
            assert result["replaced"][1][name] >= CODES // 2
            assert float(codebooks[0][name].abs().max()) > 50
            for later in codebooks[1:]:
                assert float(later[name].abs().max()) < 20, name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inner_steps_survive_the_engines_next_steps(results, case):
    """They move codes by more than 0.5, the optimiser by some 4 · lr = 4e-3: codes that fell back would show."""
    expected = results[0][0, "fp32"]["codebooks"]
    assert (expected[-1]["alternating"] - expected[0]["alternating"]).abs().max() > 0.5
    tolerance = 1e-5 if case[1] == "fp32" else 0.1  # bf16: latents and codes are off by 2⁻⁹, means of a few more
    for result in (rank[case] for rank in results):
        for found, codebooks in zip(result["codebooks"], expected, strict=True):
            torch.testing.assert_close(found["alternating"], codebooks["alternating"], atol=tolerance, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_read_the_same_bits(results, case):
    for first, second in zip(results[0][case]["codebooks"], results[1][case]["codebooks"], strict=True):
        for name in QUANTIZERS:
            assert torch.equal(first[name], second[name])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_buffers_stay_fp32(results, case):
    dtypes = results[0][case]["buffers"]
    assert dtypes["followed.code_vectors"] == torch.float32
    assert dtypes["followed.code_counts"] == torch.float32
    assert dtypes["followed.updates"] == torch.int64


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[0]])
def test_master_copies_are_fp32_and_in_the_checkpoint_bit_for_bit(results, case):
    """Of learned codes, which DeepSpeed's own bf16 mode lets the model read in bf16 only."""
    masters, saved = results[0][case]["masters"], results[0][case]["saved"]
    codes = masters["learned.code_vectors.weight"]
    assert codes.dtype == torch.float32
    assert not torch.equal(codes, codes.bfloat16().float())
    read = results[0][case]["codebooks"][-1]["learned"]
    assert torch.equal(read, codes.bfloat16().float() if case[1] == "bf16" else codes)
    for name, master in masters.items():
        assert torch.equal(saved[name], master), name
        assert torch.equal(results[1][case]["masters"][name], master), name


@pytest.mark.slow
def test_stages_train_the_same_learned_codes(results):
    expected = results[0][0, "fp32"]["codebooks"][-1]
    for stage in (1, 3):
        for name in QUANTIZERS:
            found = results[0][stage, "fp32"]["codebooks"][-1][name]
            torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-5)


def _cast_buffers():
    """Buffers under ``buffer_dtype: bf16`` at each stage; what a step says when nothing protects them."""
    found = {}
    for stage in range(4):
        engine, _ = _start(stage, {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}})
        found[stage] = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    engine, sync = _start(
        1, {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16", "keep_in_fp32_modules": []}}
    )
    with pytest.raises(RuntimeError) as unprotected:
        _step(engine, sync, 0)
    engine, sync = _start(0, {"bf16": {"enabled": True}})
    with pytest.raises(RuntimeError) as unknown_copy:
        _step(engine, sync, 0)
    return found, str(unprotected.value), str(unknown_copy.value)


@pytest.mark.slow
def test_engines_that_cast_codebook_state_are_kept_from_it_or_refused():
    torch.manual_seed(0)
    given = {name: buffer.dtype for name, buffer in Model().named_buffers()}
    for by_stage, unprotected, unknown_copy in run_ranks(_cast_buffers, 2, timeout=280):
        for found in by_stage.values():
            assert {name: buffer.dtype for name, buffer in found.items()} == given
            codes = found["followed.code_vectors"]
            assert not torch.equal(codes, codes.bfloat16().float())  # nor were they bf16 in between
        assert unprotected.startswith("followed.code_vectors is torch.bfloat16: codebook state must stay fp32")
        assert unknown_copy.startswith("alternating.code_vectors.weight is torch.bfloat16 and its fp32 copy")
