"""Health of codebooks from counts: usage, perplexity by group, names."""

import math

import pytest
import torch
from torch import nn

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.health import CodebookHealth, measure_usage
from pipeline.quantizers import build_quantizer


def test_perplexity_is_the_exponential_of_the_entropy_of_each_group():
    health = measure_usage("speech", torch.tensor([[4.0, 4.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [4.0, 2.0, 1.0, 1.0]]))
    assert health.tokens == 8
    assert health.usages == [0.5, 0.25, 1.0]
    assert health.unused == [2, 3, 0]
    assert health.perplexities == pytest.approx([2.0, 1.0, math.exp(1.75 * math.log(2))])
    summary = CodebookHealth([health]).summary()
    assert summary["codebook_usage"] == pytest.approx(1.75 / 3)
    assert summary["codebook_unused"] == 5
    assert set(summary) == {
        "codebook_usage",
        "codebook_perplexity",
        "codebook_unused",
        "codebook_replaced",
        "collapse_tokens",
    }


def test_no_token_is_no_perplexity():
    assert measure_usage("none", torch.zeros(1, 5)).perplexities == [0.0]
    assert CodebookHealth([]).summary() == {}


def test_several_quantizers_are_named_and_identity_is_left_out():
    model = nn.ModuleDict(
        {
            "coarse": build_quantizer({"kind": "ema", "dim": 2, "codes": 4}),
            "fine": build_quantizer({"kind": "ste", "dim": 2, "codes": 8}),
            "passing": build_quantizer({"kind": "identity", "dim": 2}),
        }
    )
    sync = CodebookSync(model)
    for quantizer in model.values():
        quantizer(torch.zeros(6, 2))
    summary = sync.step().summary()
    assert summary["codebook_usage/coarse"] == 0.25
    assert summary["codebook_usage/fine"] == 0.125
    assert summary["codebook_usage"] == pytest.approx(0.1875)
    assert summary["codebook_perplexity/fine"] == 1.0
    assert not any("passing" in name for name in summary)


def test_a_quantizer_used_twice_is_one_and_a_model_without_any_is_healthy():
    quantizer = build_quantizer({"kind": "ema", "dim": 2, "codes": 4})
    sync = CodebookSync(nn.ModuleList([quantizer, quantizer]))
    quantizer(torch.zeros(3, 2))
    quantizer(torch.zeros(4, 2))
    (health,) = sync.step().quantizers
    assert health.tokens == 7
    empty = CodebookSync(nn.Linear(2, 2))
    assert empty.step().summary() == {}
    assert empty.checksum() == CodebookSync(nn.Linear(3, 3)).checksum()


def test_the_checksum_sees_every_bit_of_codebook_state():
    quantizer = build_quantizer({"kind": "ema", "dim": 2, "codes": 4, "replace_after": 5})
    sync = CodebookSync(quantizer)
    seen = {sync.checksum()}
    for name, tensor in quantizer.state_dict().items():
        if tensor.is_floating_point():
            tensor.view(torch.int32).view(-1)[0] += 1  # the last bit
        else:
            tensor.view(-1)[0] += 1
        assert sync.checksum() not in seen, name
        seen.add(sync.checksum())
