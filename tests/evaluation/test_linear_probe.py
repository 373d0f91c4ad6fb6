"""The linear probe on features whose answer is known."""

from __future__ import annotations

import pytest
import torch

from pipeline.evaluation.linear_probe import probe_accuracy


def test_classes_a_plane_apart_are_told() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    features = torch.randn(90, 8, generator=generator) + 6 * torch.eye(8)[labels]
    assert probe_accuracy(features, labels, list(range(60)), list(range(60, 90))) > 0.95
    # The test clips' labels are of no use where features say nothing.
    noise = torch.randn(300, 8, generator=generator)
    assert 0.15 < probe_accuracy(noise, torch.arange(300) % 3, list(range(200)), list(range(200, 300))) < 0.55


def test_every_class_weighs_the_same() -> None:
    labels = torch.tensor([0] * 900 + [1] * 100)
    parts = list(range(0, 1000, 2)), list(range(1, 1000, 2))
    # Whoever always answers 0 is right for nine clips in ten, and for one class of two.
    assert probe_accuracy(torch.ones(1000, 2), labels, *parts) == pytest.approx(0.5)
    features = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) + 1.5 * labels.unsqueeze(1)
    assert probe_accuracy(features, labels, *parts) > 0.7  # a fit that counted clips would give 0.55


def test_units_of_features_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(80) % 2
    features = torch.randn(80, 5, generator=generator) + 0.7 * labels.unsqueeze(1)
    parts = list(range(50)), list(range(50, 80))
    scaled = features * torch.tensor([1e-3, 1.0, 1e3, 7.0, 1e5]) - 4
    assert probe_accuracy(scaled, labels, *parts) == probe_accuracy(features, labels, *parts)


def test_a_class_without_clips_to_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 have clips to fit"):
        probe_accuracy(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]), [0, 1], [2, 3])
