"""Effective dimension and code spacing on sets whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.codebooks.collapse import (
    SecondMoments,
    code_latent_divergence,
    codes_dimension,
    effective_dimension,
    fit_codes,
    gaussian_distance,
    token_concentration,
)


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


def random_covariance(dim: int, seed: int) -> torch.Tensor:
    factor = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


def test_distance_of_gaussians_with_the_same_axes() -> None:
    """(μ_a − μ_b)² + (σ_a − σ_b)² by axis: 1 + 4 + 4 + 9 + 0 + 0."""
    mean_a, mean_b = torch.tensor([[1.0, 0.0, 5.0], [0.0, 2.0, 5.0]], dtype=torch.float64)
    variances_a, variances_b = torch.tensor([[9.0, 1.0, 2.0], [1.0, 16.0, 2.0]], dtype=torch.float64)
    distance = gaussian_distance(mean_a, variances_a.diag(), mean_b, variances_b.diag())
    assert distance == pytest.approx(1 + 4 + (3 - 1) ** 2 + (1 - 4) ** 2)


def test_distance_of_gaussians_turned_against_each_other() -> None:
    """The closed form for two dimensions: tr (A·B)^½ = √(tr(A·B) + 2·√det(A·B)), whose square root is of A·B itself."""
    a, b = random_covariance(2, 1), random_covariance(2, 2)
    overlap = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float((a @ b).det())))
    zero = torch.zeros(2, dtype=torch.float64)
    assert gaussian_distance(zero, a, zero, b) == pytest.approx(float(a.trace() + b.trace()) - 2 * overlap)
    assert gaussian_distance(zero, b, zero, a) == pytest.approx(gaussian_distance(zero, a, zero, b))
    assert gaussian_distance(zero, a, zero, a) == pytest.approx(0, abs=1e-12)


def test_codes_are_fitted_to_those_in_use_far_from_the_origin_too() -> None:
    codebook = torch.randn(500, 4, generator=torch.Generator().manual_seed(3)) + 1000
    used = torch.rand(500, generator=torch.Generator().manual_seed(4)) < 0.5
    mean, covariance = fit_codes(codebook, used)
    torch.testing.assert_close(mean, codebook[used].double().mean(dim=0), atol=1e-6, rtol=0)
    torch.testing.assert_close(covariance, torch.cov(codebook[used].double().T, correction=0), atol=1e-5, rtol=0)


def test_divergence_is_0_where_codes_are_the_latents_and_1_where_they_are_their_mean() -> None:
    latents = torch.randn(400, 6, generator=torch.Generator().manual_seed(5)) @ random_covariance(6, 6).float()
    moments = SecondMoments()
    moments.add(latents)
    everyone = torch.ones(400, dtype=torch.bool)
    assert code_latent_divergence(moments, [fit_codes(latents, everyone)]) == pytest.approx(0, abs=1e-5)
    halves = [fit_codes(latents[:, :3], everyone), fit_codes(latents[:, 3:], everyone)]
    assert code_latent_divergence(moments, halves) == pytest.approx(0, abs=1e-5)
    at_mean = latents.mean(dim=0, keepdim=True)
    one = fit_codes(at_mean, torch.tensor([True]))
    assert code_latent_divergence(moments, [one]) == pytest.approx(1, abs=1e-6)
    away = fit_codes(at_mean + 3, torch.tensor([True]))
    assert code_latent_divergence(moments, [away]) == pytest.approx(1 + 6 * 9 / moments.variance(), rel=1e-5)


def test_latents_that_are_all_equal_have_no_divergence() -> None:
    moments = SecondMoments()
    moments.add(torch.ones(5, 2))
    assert moments.variance() == 0
    assert moments.mean_square() == 2
    assert math.isnan(code_latent_divergence(moments, [fit_codes(torch.eye(2), torch.ones(2, dtype=torch.bool))]))
