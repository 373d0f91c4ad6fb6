"""fp16's factor on the loss: when it moves, what it excuses, and that a run goes on with it."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.training.checkpoint import read_manifest
from pipeline.training.guard import SkipGuard, TrainingError
from pipeline.training.loss_scale import FIRST, LARGEST, LEAST, STEPS_BEFORE_GROWTH, LossScale, finish_gradients
from pipeline.training.run_folder import Run
from tests.conftest import IMAGE, train


def make_scale(enabled=True):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    finish_gradients(optimizer, clipping=0.0)
    return LossScale(SimpleNamespace(optimizer=optimizer), enabled=enabled), optimizer, weight


def test_the_scale_halves_at_an_overflow_and_doubles_after_many_good_steps():
    scale, _, _ = make_scale()
    assert scale.value == FIRST
    assert scale.update(applied=False) == FIRST / 2
    for _ in range(STEPS_BEFORE_GROWTH - 1):
        assert scale.update(applied=True) is None
    assert scale.value == FIRST / 2
    scale.update(applied=True)
    assert scale.value == FIRST


def test_the_scale_has_bounds():
    scale, _, _ = make_scale()
    while scale.update(applied=False) is not None:
        pass
    assert scale.value == LEAST
    scale.load((LARGEST, STEPS_BEFORE_GROWTH - 1))
    scale.update(applied=True)
    assert scale.value == LARGEST


def test_other_precisions_have_no_scale():
    scale, _, _ = make_scale(enabled=False)
    assert scale.update(applied=False) is None
    assert (scale.value, scale.state()) == (1.0, None)
    scale.load((FIRST, 3))
    assert scale.value == 1.0


def test_the_state_goes_on():
    scale, _, _ = make_scale()
    scale.update(applied=False)
    scale.update(applied=True)
    other, _, _ = make_scale()
    other.load(scale.state())
    assert other.state() == scale.state() == (FIRST / 2, 1)


def test_gradients_are_divided_by_the_scale_before_they_are_clipped():
    for clipping, expected in ((0.0, 2.0), (100.0, 2.0), (3.0**0.5, 1.0)):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        finish_gradients(optimizer, clipping)
        scale = LossScale(SimpleNamespace(optimizer=optimizer), enabled=True)
        scale.apply(2 * weight.sum()).backward()
        assert torch.equal(weight.grad, torch.full((3,), 2 * FIRST))
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((3,), 1 - expected))
        assert not optimizer.overflow
        assert float(optimizer._global_grad_norm) == pytest.approx(12**0.5)


def test_an_infinite_gradient_changes_nothing():
    scale, optimizer, weight = make_scale()
    scale.apply(weight.sum() * float("inf")).backward()
    optimizer.step()
    assert optimizer.overflow
    assert torch.equal(weight.detach(), torch.ones(3))


def test_a_step_that_lowered_the_scale_is_counted_but_none_in_a_row():
    guard = SkipGuard(most=2)
    batches = [SimpleNamespace(keys=["a"])]
    for step in range(5):
        guard.note(step, False, batches, lowered_to=2.0)
    guard.note(5, False, batches)
    assert guard.read() == 6
    with pytest.raises(TrainingError, match=r"2 steps in a row, on samples a"):
        guard.note(6, False, batches)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_scale(image_dataset, tmp_path):
    run = tmp_path / "run"
    for steps in (4, 8):
        train("image/autoencoder_tiny_ksom", image_dataset, run, steps, *IMAGE, "engine.precision=fp16")
    scales = [read_manifest(checkpoint).loss_scale for checkpoint in Run(run).list_checkpoints()]
    value = scales[0][0]
    assert [line["loss_scale"] for line in Run(run).log()][-1] == value
    skipped = sum(line["skipped"] for line in Run(run).log())
    assert scales == [(value, 4 - skipped), (value, 8 - skipped)]
    assert value == FIRST / 2**skipped
