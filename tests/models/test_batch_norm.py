"""Batch normalisation: torch's arithmetic, and statistics that count each micro-batch of a step once."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pipeline.codebooks import initialise_codebooks
from pipeline.models import build_model
from pipeline.models.batch_norm import BatchNorm, NormSync
from pipeline.models.config import SQVAEConfig
from pipeline.quantizers.ema import EMAConfig
from tests.distributed.harness import run_ranks
from tests.training.engine_steps import image_batch, joined, take_all

STAGES = ((0, False), (1, True), (2, False), (3, True))
"""ZeRO's, and whether activations are computed twice; recomputing alone changes no bit, which has a test."""


def norm_and_sync(channels=3, momentum=0.1):
    norm = BatchNorm(channels, momentum)
    return norm, NormSync(norm)


def test_one_micro_batch_a_step_is_torchs():
    torch.manual_seed(0)
    ours, sync = norm_and_sync()
    theirs = torch.nn.BatchNorm2d(3)
    for step in range(4):
        features = (torch.randn(5, 3, 4, 6) * 3 + 1).requires_grad_()
        same = features.detach().clone().requires_grad_()
        found, expected = ours.train()(features), theirs.train()(same)
        torch.testing.assert_close(found, expected)
        weights = torch.randn_like(found)
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(features.grad, same.grad)
        sync.step()
        if step == 0:  # torch starts from zero mean and unit variance
            theirs.running_mean.copy_(ours.running_mean)
            theirs.running_var.copy_(ours.running_variance)
            torch.testing.assert_close(ours.running_mean, features.detach().mean(dim=(0, 2, 3)))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_variance, theirs.running_var)
    features = torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(ours.eval()(features), theirs.eval()(features))
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(dict(ours.named_parameters())[name].grad, parameter.grad)


def test_a_step_has_the_means_of_its_micro_batches_statistics():
    norm, sync = norm_and_sync()
    micro_batches = [torch.randn(rows, 3, 4, 4) * scale for rows, scale in [(2, 1.0), (1, 3.0), (4, 0.5)]]
    for features in micro_batches:
        norm(features)
        torch.testing.assert_close(norm.running_mean, torch.zeros(3))
    norm.eval()(micro_batches[0])
    sync.step()
    flat = [features.transpose(0, 1).flatten(1) for features in micro_batches]
    torch.testing.assert_close(norm.running_mean, torch.stack([each.mean(dim=1) for each in flat]).mean(dim=0))
    torch.testing.assert_close(norm.running_variance, torch.stack([each.var(dim=1) for each in flat]).mean(dim=0))


def test_a_forward_computed_twice_counts_once():
    torch.manual_seed(0)
    features = torch.randn(4, 3, 5, 5)
    found = []
    for again in (False, True):
        norm, sync = norm_and_sync()
        scaled = features.clone().requires_grad_()
        output = checkpoint(norm, scaled, use_reentrant=False) if again else norm(scaled)
        (output**3).sum().backward()
        assert int(norm.pending()[-1]) == 1
        sync.step()
        found.append((norm.running_mean, norm.running_variance, norm.weight.grad, scaled.grad))
    for kept, computed_again in zip(*found, strict=True):
        assert torch.equal(kept, computed_again)


def test_a_skipped_step_leaves_no_trace():
    norm, sync = norm_and_sync()
    features = torch.randn(4, 3, 5, 5)
    norm(features)
    sync.step()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((4, 3, 5, 5), torch.nan))
    sync.discard()
    sync.step()  # of no forward
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    norm(features)
    sync.step()
    assert torch.isfinite(norm.running_mean).all()
    assert int(norm.updates) == 2


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_statistics_stay_in_fp32_under_autocast(precision):
    norm, sync = norm_and_sync()
    features = (torch.randn(64, 3, 8, 8) * 200 + 1000).to(precision)
    with torch.autocast("cpu", precision):
        norm(features)
    sync.step()
    assert norm.running_variance.dtype == torch.float32
    expected = features.float().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, expected.mean(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(norm.running_variance, expected.var(dim=1), rtol=1e-2, atol=0)


def test_k_means_before_the_first_step_sees_latents_as_training_does():
    torch.manual_seed(0)
    model = build_model(SQVAEConfig(latent_dim=8, residual_layers=1), EMAConfig(codes=16)).train()
    batch = image_batch(torch.rand(4, 3, 32, 32))
    latents = []
    model.quantizer.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].detach()))
    initialise_codebooks(model, [batch])
    assert all(int(norm.pending()[-1]) == 0 for norm in NormSync(model).norms)
    model(batch)
    assert torch.equal(latents[0], latents[1])
    assert int(NormSync(model).norms[0].pending()[-1]) == 1


@functools.cache
def runs(ranks):
    """Two steps, of which the second begins with running statistics."""
    cases = [
        ("sqvae", {"zero_stage": stage, "gradient_clipping": 0, "activation_checkpointing": again}, 2, {})
        for stage, again in STAGES
    ]
    return run_ranks(take_all, ranks, cases, timeout=280)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", range(len(STAGES)))
def test_any_number_of_ranks_gives_the_same(ranks, place):
    alone, several = runs(1)[0][place], [rank[place] for rank in runs(ranks)]
    moments = joined(several, "exp_avg")
    for name, expected in joined([alone], "exp_avg").items():
        torch.testing.assert_close(moments[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert len(alone["norms"]) == 9
    for number, reference in enumerate(alone["norms"]):
        assert int(reference["updates"]) == 2
        first, *others = [rank["norms"][number] for rank in several]
        torch.testing.assert_close(first, reference, rtol=1e-4, atol=1e-5)
        for other in others:
            assert all(torch.equal(value, first[name]) for name, value in other.items())
