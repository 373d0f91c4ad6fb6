"""Means that batch terms are taken of, on one process; tests/distributed/test_batch_terms.py has several."""

import math
import warnings

import pytest
import torch

from pipeline.quantizers.entropy import ScopeWatch, joint_mean, perplexity


@pytest.mark.parametrize("scope", ["micro_batch", "global"])
def test_one_process_has_its_own_mean(scope):
    values = torch.rand(7, 2, 3, requires_grad=True)
    mean = joint_mean(values.sum(dim=0), 7, scope)
    torch.testing.assert_close(mean, values.mean(dim=0))
    mean[0, 1].backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad[:, 0, 1], torch.full((7,), 1 / 7))
    assert float(values.grad.sum()) == pytest.approx(1)


@pytest.mark.parametrize("scope", ["micro_batch", "global"])
def test_no_tokens_have_a_mean_of_zero_with_a_graph(scope):
    values = torch.rand(0, 2, 3, requires_grad=True)
    mean = joint_mean(values.sum(dim=0), 0, scope)
    assert torch.equal(mean, torch.zeros(2, 3))
    perplexity(mean).sum().backward()
    assert values.grad is not None


def test_perplexity_is_exp_of_the_entropy_in_nats():
    shares = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125], [1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([4.0, math.exp(1.75 * math.log(2)), 1.0])
    torch.testing.assert_close(perplexity(shares), expected, atol=1e-5, rtol=1e-5)


def test_global_scope_under_accumulation_is_told_once():
    watch = ScopeWatch("gumbel", "global")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            watch.saw_forward()
            watch.saw_step()
        other = ScopeWatch("gumbel", "micro_batch")
        other.saw_forward()
        other.saw_forward()
        other.saw_step()
    watch.saw_forward()
    watch.saw_forward()
    with pytest.warns(UserWarning, match="gumbel with scope=global was called 2 times in one optimiser step"):
        watch.saw_step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watch.saw_forward()
        watch.saw_forward()
        watch.saw_step()
