"""Smoothed VQ: soft and hard paths, each kind of logits, options. ``test_simplex.py`` has the regulariser's values."""

import itertools
import warnings

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from tests.quantizers.test_simplex import Neighbourhood, textbook

GRID = list(itertools.product(["dot", "distance", "linear"], ["l2", "cross_entropy"], ["none", "l2"], [None, 4]))


def by_hand(quantizer, latents):
    """Logits over the temperature from their definitions, ``(tokens, groups, codes)``."""
    config = quantizer.config
    if quantizer.project_in is not None:
        latents = quantizer.project_in(latents)
    split = latents.reshape(len(latents), quantizer.groups, 1, -1)
    codebook = quantizer.code_vectors.weight
    if config.normalise == "l2":
        split, codebook = split / split.norm(dim=-1, keepdim=True), codebook / codebook.norm(dim=-1, keepdim=True)
    if config.logits == "dot":
        logits = (split * codebook).sum(-1)  # the cosine where both have length 1
        logits = logits if config.normalise == "l2" else logits / codebook.shape[-1] ** 0.5
    elif config.logits == "distance":
        logits = -(split - codebook).square().sum(-1)
    else:
        flat = split.reshape(len(latents), -1)
        logits = (flat @ quantizer.head.weight.T + quantizer.head.bias).reshape(len(latents), quantizer.groups, -1)
    return logits / config.temperature, codebook


@pytest.mark.parametrize(("logits", "distance", "normalise", "codebook_dim"), GRID)
def test_all_options_give_what_autograd_gives_for_the_definitions(logits, distance, normalise, codebook_dim):
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {
            "kind": "knn_simplex",
            "dim": 6,
            "codes": 5,
            "groups": 2,
            "logits": logits,
            "distance": distance,
            "normalise": normalise,
            "codebook_dim": codebook_dim,
            "temperature": 0.5,
            "weight": 0.3,
        }
    )
    latents, upstream = torch.randn(40, 6, requires_grad=True), torch.randn(40, 6)
    leaves = [latents, *quantizer.parameters()]
    found = quantizer(latents)
    gradients = torch.autograd.grad((found.vectors * upstream).sum() + 40 * found.losses["knn"], leaves)

    scores, codebook = by_hand(quantizer, latents)
    codes = scores.shape[-1]
    identity = torch.eye(codes).expand(2, codes, codes)
    vectors, loss, likeliest, _ = textbook(
        scores, identity, torch.zeros(2, codes), codebook, Neighbourhood(2, distance)
    )
    vectors = vectors.reshape(40, -1)
    vectors = vectors if quantizer.project_out is None else quantizer.project_out(vectors)
    expected = torch.autograd.grad((vectors * upstream).sum() + 40 * 0.3 * loss, leaves)
    torch.testing.assert_close(found.vectors, vectors, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.losses["knn"], 0.3 * loss, atol=1e-6, rtol=1e-5)
    assert torch.equal(found.codes, likeliest)
    torch.testing.assert_close(gradients, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("logits", ["dot", "distance", "linear"])
def test_soft_in_training_hard_at_inference(logits):
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {"kind": "knn_simplex", "dim": 6, "codes": 5, "groups": 2, "logits": logits, "temperature": 0.5}
    )
    latents = torch.randn(40, 6)
    soft = quantizer.train()(latents)
    scores = by_hand(quantizer, latents)[0].detach()
    mixtures = torch.softmax(scores, dim=-1)
    expected = torch.cat([mixtures[:, group] @ quantizer.codebook()[group] for group in range(2)], dim=1)
    torch.testing.assert_close(soft.vectors, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(soft.codes, scores.argmax(dim=-1))
    hard = quantizer.eval()(latents)
    assert torch.equal(hard.codes, soft.codes)
    assert torch.equal(hard.vectors, quantizer.decode(hard.codes))
    gap = (soft.vectors - hard.vectors).square().mean()
    torch.testing.assert_close(soft.metrics["soft_hard_gap"], gap.detach(), atol=1e-6, rtol=1e-4)


def test_gumbel_samples_follow_the_mixture():
    """argmax of logits plus Gumbel noise is a sample of the softmax."""
    quantizer = build_quantizer(
        {"kind": "knn_simplex", "dim": 2, "codes": 3, "logits": "linear", "sampler": "gumbel", "weight": 0.0}
    )
    quantizer.head.weight.data.zero_()
    quantizer.head.bias.data.copy_(torch.tensor([0.6, 0.3, 0.1]).log())
    torch.manual_seed(0)
    usage = quantizer(torch.zeros(20_000, 2)).usage[0] / 20_000
    torch.testing.assert_close(usage, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)


@pytest.mark.parametrize("logits", ["dot", "distance", "linear"])
def test_codes_can_be_set(logits):
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "knn_simplex", "dim": 6, "codes": 5, "groups": 2, "logits": logits})
    codebook = torch.randn(2, 5, 3)
    quantizer.set_codebook(codebook)
    assert torch.equal(quantizer.codebook(), codebook)
    if logits != "dot":
        latents = torch.randn(100, 6)
        nearest = (latents.reshape(100, 2, 1, 3) - codebook).square().sum(-1).argmin(-1)
        assert torch.equal(quantizer.encode(latents), nearest)


def test_too_few_tokens_are_told_once():
    quantizer = build_quantizer({"kind": "knn_simplex", "dim": 4, "codes": 8, "neighbours": 3})
    with pytest.warns(UserWarning, match="got 10 tokens for neighbours=3 × codes=8.*bring 24 tokens"):
        quantizer(torch.randn(10, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer(torch.randn(10, 4))
        build_quantizer({"kind": "knn_simplex", "dim": 4, "codes": 8, "neighbours": 3})(torch.randn(24, 4))


def test_codes_of_another_space_are_known_as_such():
    def compares(**options):
        return build_quantizer({"kind": "knn_simplex", "dim": 4, "codes": 8, **options}).compares_latents

    assert compares(logits="distance")
    assert compares(logits="dot", normalise="l2")
    assert not compares(logits="dot")
    assert not compares(logits="linear", normalise="l2")


def test_global_scope_under_accumulation_is_told():
    quantizer = build_quantizer({"kind": "knn_simplex", "dim": 4, "codes": 2, "scope": "global"})
    sync = CodebookSync(quantizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer(torch.randn(10, 4))
        sync.step()
        quantizer.eval()(torch.randn(10, 4))
        quantizer.train()(torch.randn(10, 4))
        sync.step()
        quantizer(torch.randn(10, 4))
    quantizer(torch.randn(10, 4))
    with pytest.warns(UserWarning, match="knn_simplex with scope=global was called 2 times in one optimiser step"):
        sync.step()


def test_without_weight_nothing_is_looked_for():
    quantizer = build_quantizer({"kind": "knn_simplex", "dim": 4, "codes": 8, "weight": 0.0})
    latents = torch.randn(10, 4, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = quantizer(latents)
    assert float(out.losses["knn"].detach()) == 0
    (out.losses["knn"] + out.vectors.sum()).backward()
    assert bool((latents.grad != 0).any())
