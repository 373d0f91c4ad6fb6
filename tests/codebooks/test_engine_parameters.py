"""Codebooks inside a real DeepSpeed engine, on two ranks: precision, and codes that are replaced between its steps.

A learned codebook that is written beside the engine's master copy is back where it was after the next step.
"""

import os

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks

DIM, CODES = 6, 9


class Model(nn.Module):
    def __init__(self):
        from pipeline.quantizers import build_quantizer

        super().__init__()
        self.encoder = nn.Linear(DIM, DIM)
        self.followed = build_quantizer({"kind": "ema", "dim": DIM, "codes": CODES, "replace_after": 2})
        self.learned = build_quantizer({"kind": "ste", "dim": DIM, "codes": CODES, "replace_after": 2})

    def forward(self, inputs):
        latents = self.encoder(inputs)
        return sum(sum(quantizer(latents).losses.values()) for quantizer in (self.followed, self.learned))


def _train(cases):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    from pipeline import collectives
    from pipeline.codebooks import CodebookSync

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    results = {}
    for stage, precision in cases:
        torch.manual_seed(0)
        model = Model()
        with torch.no_grad():
            model.learned.code_vectors.weight[0, CODES // 2 :] += 100  # far from everything: these die
            far = model.followed.codebook().clone()
            far[0, CODES // 2 :] += 100
            model.followed.set_codebook(far)
        sync = CodebookSync(model)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": precision == "bf16"},
                "steps_per_print": 2**31,
            },
            dist_init_required=False,
        )
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        replaced, codebooks = [], []
        for step in range(4):
            inputs = torch.randn(40, DIM, generator=torch.Generator().manual_seed(10 * step + collectives.rank()))
            loss = engine(inputs.to(dtype))
            engine.backward(loss)
            engine.step()
            health = sync.step()
            replaced.append([quantizer.replaced for quantizer in health.quantizers])
            module = engine.module
            codebooks.append({name: getattr(module, name).codebook().clone() for name in ("followed", "learned")})
        sync.check_ranks_agree()
        buffers = {name: buffer.dtype for name, buffer in engine.module.named_buffers()}
        results[stage, precision] = {"replaced": replaced, "codebooks": codebooks, "buffers": buffers}
    return results


CASES = [(1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "fp32"), (3, "bf16")]


@pytest.fixture(scope="module")
def results():
    return run_ranks(_train, 2, CASES, timeout=280)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replaced_codes_survive_the_engines_next_steps(results, case):
    for result in (rank[case] for rank in results):
        codebooks = result["codebooks"]
        assert result["replaced"][0] == [0, 0]
        assert min(result["replaced"][1]) >= CODES // 2
        for name in ("followed", "learned"):
            assert float(codebooks[0][name].abs().max()) > 50
            for later in codebooks[1:]:
                assert float(later[name].abs().max()) < 20, name
    for first, second in zip(results[0][case]["codebooks"], results[1][case]["codebooks"], strict=True):
        assert torch.equal(first["learned"], second["learned"])
        assert torch.equal(first["followed"], second["followed"])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_codebook_state_stays_fp32(results, case):
    dtypes = results[0][case]["buffers"]
    assert dtypes["followed.code_vectors"] == torch.float32
    assert dtypes["followed.code_counts"] == torch.float32
    assert dtypes["followed.updates"] == torch.int64


@pytest.mark.slow
def test_stages_and_ranks_train_the_same_learned_codes(results):
    expected = results[0][1, "fp32"]["codebooks"][-1]["learned"]
    torch.testing.assert_close(results[0][3, "fp32"]["codebooks"][-1]["learned"], expected, atol=1e-5, rtol=1e-5)
