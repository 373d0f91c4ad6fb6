"""The K-nearest-neighbour regulariser: golden values, the paper's Dirichlet clouds, soft and hard paths."""

import warnings

import pytest
import torch

from pipeline.quantizers import build_quantizer

MIXTURES = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])


def regulariser(distance, neighbours, mixtures=MIXTURES):
    codes = mixtures.shape[1]
    quantizer = build_quantizer(
        {"kind": "knn_simplex", "dim": 2, "codes": codes, "neighbours": neighbours, "distance": distance}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(quantizer.regularise(mixtures.log().unsqueeze(1), mixtures.unsqueeze(1)).detach())


@pytest.mark.parametrize(
    ("distance", "neighbours", "value"),
    [("l2", 1, 0.246667), ("l2", 2, 0.5), ("cross_entropy", 1, 0.498703), ("cross_entropy", 2, 0.918915)],
)
def test_golden_values(distance, neighbours, value):
    assert regulariser(distance, neighbours) == pytest.approx(value, abs=1e-6)


def test_it_tells_clouds_apart_that_have_the_same_mean():
    """Figure 1b of the paper: all of these have a mean perplexity of 3, which a perplexity loss can't tell apart."""
    one_hot = torch.eye(3).repeat(1000, 1)
    assert regulariser("l2", 8, one_hot) == 0
    assert regulariser("l2", 8, torch.eye(3)[[0]].expand(3000, 3)) == pytest.approx(4 / 3)
    torch.manual_seed(0)
    values = []
    for alpha in (0.05, 0.5, 1.0, 2.0, 50.0):
        cloud = torch.distributions.Dirichlet(torch.full((3,), alpha)).sample((3000,))
        values.append(regulariser("l2", 8, cloud))
    assert values == sorted(values)
    assert values[0] < 1e-5
    assert values[2] == pytest.approx(0.0024, rel=0.6)
    assert values[3] == pytest.approx(0.0251, rel=0.4)
    assert values[4] == pytest.approx(0.4501, rel=0.1)


def test_only_the_nearest_tokens_feel_the_pull():
    quantizer = build_quantizer(
        {"kind": "knn_simplex", "dim": 3, "codes": 3, "neighbours": 1, "distance": "cross_entropy"}
    )
    logits = MIXTURES.log().unsqueeze(1).requires_grad_()
    quantizer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantizer.regularise(logits, logits.exp()).backward()
    expected = torch.zeros(4, 1, 3)  # vertices 0, 1, 2 pull tokens 0, 2, 3: −1/3 each
    expected[0, 0, 0] = expected[2, 0, 1] = expected[3, 0, 2] = -1 / 3
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("logits", ["dot", "distance", "linear"])
def test_soft_in_training_hard_at_inference(logits):
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {"kind": "knn_simplex", "dim": 6, "codes": 5, "groups": 2, "logits": logits, "temperature": 0.5}
    )
    latents = torch.randn(40, 6)
    soft = quantizer.train()(latents)
    scores = quantizer.score(latents, quantizer.codebook()) / 0.5
    if logits != "linear":
        split, codebook = latents.reshape(40, 2, 1, 3), quantizer.codebook()
        by_hand = {
            "dot": (split * codebook).sum(-1) / 3**0.5,
            "distance": -(split - codebook).square().sum(-1),
        }[logits]
        torch.testing.assert_close(torch.softmax(scores, -1), torch.softmax(by_hand / 0.5, -1), atol=1e-5, rtol=1e-5)
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
