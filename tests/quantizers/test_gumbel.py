"""wav2vec 2.0's quantizer: temperature by optimiser step, the diversity loss, gradients of the hard sample."""

import math

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.tiles import gumbel_noise


def build(**options):
    torch.manual_seed(0)
    return build_quantizer({"kind": "gumbel", "dim": 6, "codes": 4, "groups": 2, **options})


def logits_of(quantizer, latents):
    weight, bias = quantizer.head()
    return torch.einsum("td,gkd->tgk", latents, weight) + bias


@pytest.mark.parametrize(
    ("updates", "temperature"), [(0, 2.0), (1000, 1.990025), (100_000, 1.21306), (277_259, 0.5), (400_000, 0.5)]
)
def test_published_temperatures(updates, temperature):
    quantizer = build()
    quantizer.updates.fill_(updates)
    assert float(quantizer.temperature()) == pytest.approx(temperature, abs=5e-6)


def test_temperature_falls_by_optimiser_steps_and_not_by_forwards():
    quantizer = build(temperature=[2.0, 0.5, 0.5])
    sync = CodebookSync(quantizer)
    seen = []
    for _ in range(4):
        for _micro_batch in range(3):
            output = quantizer(torch.randn(5, 6))
        seen.append(float(output.metrics["temperature"]))
        sync.step()
    assert seen == [2.0, 1.0, 0.5, 0.5]


def test_diversity_is_that_of_the_mean_softmax_without_noise():
    quantizer = build(diversity_weight=0.1)
    latents = torch.randn(50, 6)
    loss = quantizer(latents).losses["diversity"]
    logits = logits_of(quantizer, latents).detach()
    probabilities = torch.softmax(logits, dim=-1).mean(dim=0).double()
    perplexities = torch.exp(-(probabilities * probabilities.log()).sum(dim=-1))
    assert float(loss.detach()) == pytest.approx(float(0.1 * (8 - perplexities.sum()) / 8), abs=1e-6)


def test_golden_diversity():
    """Section 4.5 of the specification: perplexity 2.815653 of the mean (.425, .4, .175), loss (M − ppl)/M."""
    quantizer = build(codes=3, groups=1, dim=3, diversity_weight=1.0)
    quantizer.head.weight.data.copy_(torch.eye(3))
    mixtures = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]])
    for training in (True, False):
        out = quantizer.train(training)(mixtures.log())
        assert float(out.losses["diversity"].detach()) == pytest.approx(0.061449, abs=1e-6)
        assert float(out.metrics["prob_perplexity"]) == pytest.approx(2.815653, abs=3e-6)


def test_global_scope_on_one_process_is_that_of_the_micro_batch_and_tells_of_accumulation():
    latents = torch.randn(20, 6)
    losses = [build(scope=scope)(latents).losses["diversity"] for scope in ("micro_batch", "global")]
    assert torch.equal(*losses)
    quantizer = build(scope="global")
    sync = CodebookSync(quantizer)
    for _ in range(2):
        quantizer(latents)
    with pytest.warns(UserWarning, match="gumbel with scope=global was called 2 times in one optimiser step"):
        sync.step()
    assert not quantizer.compares_latents


def test_diversity_of_even_and_of_collapsed_codes():
    quantizer = build(diversity_weight=1.0)
    quantizer.head.weight.data.zero_()
    assert float(quantizer(torch.randn(9, 6)).losses["diversity"].detach()) == pytest.approx(0, abs=1e-5)
    quantizer.head.bias.data.copy_(torch.tensor([50.0, 0, 0, 0] * 2))
    # each group's perplexity is 1: (2·4 − 2) / (2·4)
    assert float(quantizer(torch.randn(9, 6)).losses["diversity"].detach()) == pytest.approx(0.75, abs=1e-5)
    quantizer.head.bias.data.copy_(torch.tensor([0.25, 0.25, 0.25, 0.25, 0.5, 0.25, 0.125, 0.125]).log())
    expected = (8 - 4 - math.exp(1.75 * math.log(2))) / 8  # the second group's entropy is 1.75 bits
    assert float(quantizer(torch.randn(9, 6)).losses["diversity"].detach()) == pytest.approx(expected, abs=1e-5)


def test_samples_follow_the_softmax_and_inference_takes_the_likeliest():
    quantizer = build()
    quantizer.head.weight.data.zero_()
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    quantizer.head.bias.data.copy_(torch.cat([shares, shares.flip(0)]).log())
    latents = torch.zeros(20_000, 6)
    usage = quantizer(latents).usage / 20_000
    torch.testing.assert_close(usage, torch.stack([shares, shares.flip(0)]), atol=0.015, rtol=0)
    assert torch.equal(quantizer.encode(latents[:3]), torch.tensor([[0, 3]] * 3))
    assert torch.equal(quantizer.eval()(latents[:3]).codes, torch.tensor([[0, 3]] * 3))


def test_gradients_are_those_of_the_straight_through_one_hot():
    """Against the textbook form y = onehot + soft − sg(soft), out = y·C, with the same noise."""
    quantizer = build(input_dim=5)
    latents, upstream = torch.randn(7, 5), torch.randn(7, 6)
    torch.manual_seed(4)
    output = quantizer(latents)
    (output.vectors * upstream).sum().backward()
    gradients = [parameter.grad.clone() for parameter in quantizer.parameters()]

    quantizer.zero_grad()
    torch.manual_seed(4)
    logits = logits_of(quantizer, latents)
    noise = gumbel_noise(torch.empty(7, 2, 4))
    soft = torch.softmax((logits + noise) / 2.0, dim=-1)
    one_hot = torch.nn.functional.one_hot(soft.argmax(-1), 4).float()
    vectors = torch.einsum("tgk,gkd->tgd", one_hot + soft - soft.detach(), quantizer.code_vectors()).reshape(7, 6)
    torch.testing.assert_close(output.vectors, vectors, atol=1e-6, rtol=1e-5)
    (vectors * upstream).sum().backward()
    for gradient, parameter in zip(gradients, quantizer.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-5)


def test_published_initial_values_and_sizes():
    quantizer = build_quantizer({"kind": "gumbel", "dim": 256, "input_dim": 512})
    assert quantizer.codebook().shape == (2, 320, 128)
    assert quantizer.head.weight.shape == (640, 512)
    assert 0 <= float(quantizer.codebook().min()) <= float(quantizer.codebook().max()) <= 1
    assert float(quantizer.head.weight.detach().std()) == pytest.approx(1, abs=0.01)
    assert not quantizer.head.bias.any()
    output = quantizer(torch.randn(2, 3, 512))
    assert output.vectors.shape == (2, 3, 256)
    assert output.codes.shape == (2, 3, 2)


@pytest.mark.parametrize("temperature", [[0.5, 2.0, 0.9], [2.0, 0.0, 0.9], [2.0, 0.5, 1.1]])
def test_temperatures_that_do_not_fall_are_refused(temperature):
    with pytest.raises(ValueError, match=r"temperature=.* does not fall: use \[start, end, factor\]"):
        build(temperature=temperature)
