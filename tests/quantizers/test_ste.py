"""Straight-through VQ: published gradients for each β, the synchronised update, normalisation."""

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer

LATENTS = torch.tensor([[0.2, 0.0], [0.1, 0.2], [1.1, 0.0]])
CODES = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]])
UPSTREAM = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def build(**options):
    quantizer = build_quantizer({"kind": "ste", "dim": 2, "codes": 3, **options})
    quantizer.code_vectors.weight.data.copy_(CODES)
    return quantizer


@pytest.mark.parametrize(
    ("beta", "of_codes", "of_latents"),
    [
        (1.0, [(-0.1, -0.066667), (-0.033333, 0), (0, 0)], [(0, 0), (0, 0), (0, 0)]),
        (0.9, [(-0.09, -0.06), (-0.03, 0), (0, 0)], [(0.006667, 0), (0.003333, 0.006667), (0.003333, 0)]),
        (0.25, [(-0.025, -0.016667), (-0.008333, 0), (0, 0)], [(0.05, 0), (0.025, 0.05), (0.025, 0)]),
    ],
)
def test_published_gradients(beta, of_codes, of_latents):
    quantizer = build(beta=beta)
    latents = LATENTS.clone().requires_grad_()
    loss = sum(quantizer(latents).losses.values())
    assert float(loss.detach()) == pytest.approx(0.016667, abs=1e-6)  # the value does not depend on β
    loss.backward()
    torch.testing.assert_close(quantizer.code_vectors.weight.grad[0], torch.tensor(of_codes).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents.grad, torch.tensor(of_latents).float(), atol=1e-6, rtol=0)


def test_alpha_weighs_the_loss():
    latents = LATENTS.clone()
    assert float(sum(build(alpha=5.0)(latents).losses.values()).detach()) == pytest.approx(5 * 0.016667, abs=1e-5)


@pytest.mark.parametrize(("nu", "expected"), [(0.0, None), (2.0, [(8, 12), (10, 12), (0, 0)])])
def test_published_synchronised_update(nu, expected):
    """Codes get ν times their tokens' gradient; latents get theirs unchanged; the value is the codes' to the bit."""
    quantizer = build(sync_nu=nu)
    latents = LATENTS.clone().requires_grad_()
    vectors = quantizer(latents).vectors
    assert torch.equal(vectors.detach(), CODES[0][[0, 0, 1]])
    (vectors * UPSTREAM).sum().backward()
    assert torch.equal(latents.grad, UPSTREAM)
    if expected is None:
        assert quantizer.code_vectors.weight.grad is None
    else:
        torch.testing.assert_close(quantizer.code_vectors.weight.grad[0], torch.tensor(expected).float())


def test_the_synchronised_update_has_the_right_sign():
    """One SGD step moves a code to (1 − η)c + ηz − η²g; the paper's equation prints + before the last term."""
    rate = 0.1
    quantizer = build(beta=1.0, alpha=1.0, sync_nu=rate)
    latents, upstream = torch.tensor([[0.2, 0.4]]), torch.tensor([[3.0, -1.0]])
    output = quantizer(latents)
    # The mean over 2 features makes the loss's gradient (c − z): 2 / 2.
    ((output.vectors * upstream).sum() + output.losses["codebook"]).backward()
    with torch.no_grad():
        moved = quantizer.code_vectors.weight[0, 0] - rate * quantizer.code_vectors.weight.grad[0, 0]
    torch.testing.assert_close(moved, rate * latents[0] - rate**2 * upstream[0])


def test_normalised_codes_and_latents_have_length_1_in_each_group():
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "ste", "dim": 8, "codes": 16, "groups": 2, "normalise": "l2"})
    latents = 7 * torch.randn(50, 8)
    output = quantizer(latents)
    lengths = output.vectors.detach().reshape(50, 2, 4).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(50, 2))
    torch.testing.assert_close(quantizer.codebook().norm(dim=-1), torch.ones(2, 16))
    # the nearest on the sphere is the one with the largest cosine
    cosine = torch.nn.functional.cosine_similarity(
        latents.reshape(50, 2, 1, 4), quantizer.codebook().unsqueeze(0), dim=-1
    )
    assert torch.equal(output.codes, cosine.argmax(dim=-1))


def test_max_norm_shortens_and_never_lengthens():
    """The published layer swaps l2 and max-norm between latents and codes (its defect 1); here both get the same."""
    quantizer = build_quantizer({"kind": "ste", "dim": 2, "codes": 2, "normalise": "max_norm"})
    quantizer.code_vectors.weight.data.copy_(torch.tensor([[[30.0, 40.0], [0.3, 0.4]]]))
    torch.testing.assert_close(quantizer.codebook(), torch.tensor([[[6.0, 8.0], [0.3, 0.4]]]))
    torch.testing.assert_close(
        quantizer.real_latents(torch.tensor([[60.0, 80.0], [3.0, 4.0]]), None), torch.tensor([[6.0, 8.0], [3.0, 4.0]])
    )


def test_the_step_of_a_learned_codebook_belongs_to_the_optimiser():
    quantizer = build()
    sync = CodebookSync(quantizer)
    quantizer(LATENTS)
    health = sync.step()
    assert torch.equal(quantizer.codebook(), CODES)
    assert health.quantizers[0].unused == [1]


def test_published_inner_step():
    """Golden values for one in-place step of lr 1: ρ_k = 2·lr·n_k / (3 tokens · 2 features) = n_k / 3."""
    quantizer = build(beta=1.0, inner_steps=1, inner_rate=1 / 3)
    sync = CodebookSync(quantizer)
    quantizer(LATENTS)
    assert torch.equal(quantizer.codebook(), CODES)  # a forward moves nothing
    sync.step()
    expected = torch.tensor([[0.1, 0.066667], [1.033333, 0.0], [4.0, 0.0]])
    torch.testing.assert_close(quantizer.codebook()[0], expected, atol=1e-6, rtol=0)


def test_inner_steps_are_gradient_steps_on_the_codebook_loss():
    torch.manual_seed(0)
    rate, steps, codes = 0.03, 5, 6
    quantizer = build_quantizer({"kind": "ste", "dim": 4, "codes": codes, "inner_steps": steps, "inner_rate": rate})
    sync = CodebookSync(quantizer)
    latents = torch.randn(40, 4)
    expected = quantizer.codebook()[0].double().requires_grad_()
    for part in latents.split(25):
        quantizer(part)
    chosen = quantizer.encode(latents)[:, 0]
    optimizer = torch.optim.SGD([expected], lr=rate * codes * 4 / 2)
    for _ in range(steps):
        optimizer.zero_grad()
        (expected[chosen] - latents.double()).square().mean().backward()
        optimizer.step()
    sync.step()
    torch.testing.assert_close(quantizer.codebook()[0].double(), expected.detach(), atol=1e-6, rtol=1e-6)


def test_codes_that_make_inner_steps_get_no_gradient_of_the_codebook_loss():
    quantizer = build(inner_steps=2, beta=0.9)
    latents = LATENTS.clone().requires_grad_()
    output = quantizer(latents)
    sum(output.losses.values()).backward()
    assert quantizer.code_vectors.weight.grad is None
    torch.testing.assert_close(latents.grad[0], torch.tensor([0.006667, 0.0]), atol=1e-6, rtol=0)  # commitment stays


def test_inner_steps_keep_the_optimisers_moments():
    quantizer = build(inner_steps=1, sync_nu=1.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-3)
    sync = CodebookSync(quantizer, optimizer=optimizer)
    (quantizer(LATENTS).vectors * UPSTREAM).sum().backward()
    optimizer.step()
    before = optimizer.state[quantizer.code_vectors.weight]["exp_avg"].clone()
    sync.step()
    assert before[0, 0].abs().sum() > 0
    assert torch.equal(optimizer.state[quantizer.code_vectors.weight]["exp_avg"], before)


def test_a_code_that_gets_most_tokens_goes_no_further_than_their_mean():
    quantizer = build(inner_steps=1, inner_rate=0.9)
    sync = CodebookSync(quantizer)
    quantizer(LATENTS)  # code 0 has 2 of 3 tokens: ρ would be 1.8
    sync.step()
    torch.testing.assert_close(quantizer.codebook()[0, 0], LATENTS[:2].mean(dim=0))
