"""Lookup-free quantization: signs, code numbers, entropies against the plain formula over all codes."""

import math

import pytest
import torch

from pipeline.quantizers import build_quantizer


def build(**options):
    torch.manual_seed(0)
    return build_quantizer({"kind": "lfq", "dim": 6, "codes": 64, **options})


def test_signs_and_code_numbers():
    quantizer = build(dim=3, codes=8)
    output = quantizer(torch.tensor([[0.5, -2.0, 0.1], [-1.0, 3.0, 0.0], [1.0, 1.0, 1.0]]))
    assert output.vectors.tolist() == [[1, -1, 1], [-1, 1, -1], [1, 1, 1]]  # 0 counts as −1
    assert output.codes.flatten().tolist() == [0b101, 0b010, 0b111]
    torch.testing.assert_close(quantizer.decode(output.codes), output.vectors)


def test_on_the_sphere_vectors_have_length_1():
    quantizer = build(spherical=True)
    latents = torch.randn(20, 6)
    output = quantizer(latents)
    torch.testing.assert_close(output.vectors.detach().norm(dim=-1), torch.ones(20))
    torch.testing.assert_close(output.vectors.detach(), latents.sign() / 6**0.5)
    assert torch.equal(build(spherical=True).encode(7 * latents), output.codes)


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("codes", "groups"), [(64, 1), (8, 2), (2, 6)])
@pytest.mark.parametrize("inverse_temperature", [0.3, 3.0])
def test_entropies_and_their_gradient_are_those_over_all_codes(spherical, codes, groups, inverse_temperature):
    """p = softmax(2·T·z·c) in float64 over all codes, tokens × codes and all."""
    options = {"codes": codes, "groups": groups, "spherical": spherical, "inverse_temperature": inverse_temperature}
    quantizer = build(dim=groups * (codes.bit_length() - 1), diversity_gamma=0.7, **options)
    latents = torch.randn(30, quantizer.dim).requires_grad_()
    loss = quantizer(latents).losses["entropy"]
    loss.backward()

    plain = latents.detach().double().requires_grad_()
    split = plain.reshape(30, groups, -1)
    split = torch.nn.functional.normalize(split, dim=-1) if spherical else split
    products = torch.einsum("tgd,gkd->tgk", split, quantizer.codebook().double())
    probabilities = torch.softmax(2 * inverse_temperature * products, dim=-1)
    of_token = -(probabilities * probabilities.log()).sum(dim=-1).mean()
    mean = probabilities.mean(dim=0)
    of_mean = -(mean * mean.log()).sum(dim=-1).mean()
    expected = 0.1 * (of_token - 0.7 * of_mean)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(latents.grad.double(), plain.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_entropies_are_exact_for_steep_distributions(scale):
    """At the published temperature exponents go into the thousands; float64 over all codes is what they are held to."""
    quantizer = build(dim=12, codes=4096)
    latents = (scale * torch.randn(200, 12)).requires_grad_()
    loss = quantizer(latents).losses["entropy"]
    loss.backward()

    plain = latents.detach().double().requires_grad_()
    logs = torch.log_softmax(200 * plain @ quantizer.codebook()[0].double().T, dim=-1)
    mean = logs.exp().mean(dim=0)
    expected = 0.1 * (torch.special.xlogy(mean, mean).sum() - (logs.exp() * logs).sum(dim=-1).mean())
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(latents.grad.double(), plain.grad, atol=1e-5 * float(plain.grad.abs().max()), rtol=1e-4)


def test_the_entropy_loss_spreads_collapsed_codes():
    """Latents that all begin in one code fill the codebook, and stay near their code."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(4, 4)
    with torch.no_grad():
        encoder.bias.fill_(3)
    quantizer = build(dim=4, codes=16, inverse_temperature=1.0)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=5e-2)
    used = []
    for step in range(150):
        output = quantizer(encoder(torch.randn(256, 4, generator=torch.Generator().manual_seed(step))))
        optimizer.zero_grad()
        output.losses["entropy"].backward()
        optimizer.step()
        used.append(int((output.usage > 0).sum()))
    assert used[0] <= 2
    assert used[-1] == 16
    assert float(output.metrics["prob_perplexity"]) > 14
    assert float(output.metrics["token_entropy"]) < 0.5 * torch.tensor(16.0).log()


def test_sure_tokens_have_no_entropy_and_finite_gradients():
    quantizer = build()
    latents = (100 * torch.randn(50, 6)).requires_grad_()
    output = quantizer(latents)
    assert float(output.metrics["token_entropy"]) == pytest.approx(0, abs=1e-6)
    output.losses["entropy"].backward()
    assert torch.isfinite(latents.grad).all()


def test_even_use_of_all_codes_is_the_largest_entropy():
    quantizer = build()
    output = quantizer(quantizer.codebook()[0])
    assert float(output.metrics["prob_perplexity"]) == pytest.approx(64, rel=1e-5)
    assert float(output.losses["entropy"]) == pytest.approx(-0.1 * math.log(64), rel=1e-5)


def test_commitment_pulls_latents_to_their_signs():
    quantizer = build(commitment=0.25, entropy_weight=0)
    latents = torch.tensor([[0.5, -2.0, 1.0, -1.0, 3.0, -0.5]]).requires_grad_()
    output = quantizer(latents)
    assert float(output.losses["commitment"].detach()) == pytest.approx(0.25 * (0.25 + 1 + 4 + 0.25) / 6)
    output.losses["commitment"].backward()
    torch.testing.assert_close(latents.grad, 0.25 * 2 / 6 * (latents.detach() - latents.detach().sign()))


def test_the_entropy_of_many_codes_needs_no_tokens_times_codes():
    """2¹⁸ codes for 4096 tokens: a tensor of both would take 4 GB."""
    quantizer = build(dim=18, codes=2**18)
    latents = torch.randn(4096, 18).requires_grad_()
    quantizer(latents).losses["entropy"].backward()
    assert torch.isfinite(latents.grad).all()


def test_latents_of_another_size_are_mapped_to_the_bits_and_back():
    quantizer = build(dim=10, codes=16, groups=2)
    assert quantizer.codebook_dim == 8
    latents = torch.randn(7, 10).requires_grad_()
    output = quantizer(latents)
    assert (output.vectors.shape, output.codes.shape) == ((7, 10), (7, 2))
    (output.vectors.square().sum() + output.losses["entropy"]).backward()
    for tensor in (latents, *quantizer.parameters()):
        assert tensor.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codes": 100}, "codes=100 is no power of 2: use codes=64 or 128"),
        ({"inverse_temperature": 0}, "inverse_temperature"),
        ({"normalise": "l2"}, "unknown option"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
