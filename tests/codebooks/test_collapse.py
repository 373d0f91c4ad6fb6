"""Effective dimension and code spacing on sets whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.codebooks.collapse import SecondMoments, codes_dimension, effective_dimension, token_concentration


def test_dimension_of_known_variances() -> None:
    assert effective_dimension(torch.eye(10)) == 10
    assert effective_dimension(torch.diag(torch.tensor([98.0, 1.0, 1.0, 0.0]))) == 2
    assert effective_dimension(torch.diag(torch.tensor([98.5, 0.4, 0.4, 0.4, 0.3]))) == 3
    assert effective_dimension(torch.zeros(4, 4)) == 0


def test_dimension_does_not_depend_on_the_axes() -> None:
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    flat = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert effective_dimension(rotation @ flat @ rotation.T) == 3


def test_moments_over_batches_are_those_of_the_whole() -> None:
    vectors = torch.randn(97, 5, generator=torch.Generator().manual_seed(2)) * 3 + 7
    moments = SecondMoments()
    for part in vectors.split(13):
        moments.add(part)
    assert moments.count == 97
    torch.testing.assert_close(moments.covariance(), torch.cov(vectors.double().T, correction=0))


def test_moments_of_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        SecondMoments().covariance()


def test_only_used_codes_count() -> None:
    codebook = torch.cat([torch.eye(3)[:2] * 5, torch.randn(6, 3)])
    used = torch.tensor([True, True] + [False] * 6)
    assert codes_dimension(codebook, used) == 1
    assert codes_dimension(codebook, torch.zeros(8, dtype=torch.bool)) == 0


def test_spacing_of_codes() -> None:
    codebook = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0], [0.1, 0.0]])
    used = torch.tensor([True, True, True, False])
    assert token_concentration(codebook, used, latent_rms=2.0) == pytest.approx((3 + 3 + 4) / 3 / 2)
    assert math.isnan(token_concentration(codebook, torch.tensor([True, False, False, False]), 1.0))
