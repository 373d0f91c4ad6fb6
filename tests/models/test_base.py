"""Quantizers' metrics as models log them: means over real tokens of all micro-batches."""

import math

import pytest
import torch

from pipeline.models.base import quantizer_metrics
from pipeline.quantizers import QuantizerOutput, build_quantizer


def quantized(tokens, **metrics):
    """An output of so many real tokens and two of padding."""
    codes = torch.cat([torch.zeros(tokens, 1), torch.full((2, 1), -1)]).long()
    values = {name: torch.tensor(value) for name, value in metrics.items()}
    return QuantizerOutput(torch.zeros(tokens + 2, 4), codes, {}, torch.zeros(1, 3), values)


def test_micro_batches_count_by_their_tokens():
    outputs = [quantized(6, gap=1.0, temperature=2.0), quantized(2, gap=5.0, temperature=2.0)]
    pairs = [quantizer_metrics(output) for output in outputs]
    means = {
        name: float(sum(pair[name][0] for pair in pairs) / sum(pair[name][1] for pair in pairs)) for name in pairs[0]
    }
    assert means == {"quantizer_gap": 2.0, "quantizer_temperature": 2.0}


def test_a_micro_batch_of_padding_counts_nothing():
    numerator, denominator = quantizer_metrics(quantized(0, gap=math.nan))["quantizer_gap"]
    assert (float(numerator), int(denominator)) == (0.0, 0)


@pytest.mark.parametrize("kind", ["gumbel", "knn_simplex", "lfq", "ema"])
def test_names_do_not_depend_on_the_tokens(kind):
    """Ranks compare the names of what they log: one without tokens must bring the same."""
    quantizer = build_quantizer({"kind": kind, "dim": 4, "codes": 8})
    mask = torch.ones(5, dtype=torch.bool)
    some, none = quantizer(torch.randn(5, 4), mask), quantizer(torch.randn(5, 4), ~mask)
    assert quantizer_metrics(some).keys() == quantizer_metrics(none).keys()
    assert all(float(numerator) == 0 for numerator, _ in quantizer_metrics(none).values())
