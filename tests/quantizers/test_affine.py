"""Affine codes: moments match, unselected codes move, latents written as codes come out as they went in."""

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer


def build(**options):
    torch.manual_seed(0)
    return build_quantizer({"kind": "affine", "dim": 4, "codes": 12, **options})


def test_corrected_equations_40_to_45():
    """μ_z 2, σ_z 3, μ_C −1, σ_C 0.5, codes (−1.5, −1, −0.5) → (−1, 2, 5); as printed they would give (0, 3, 6)."""
    quantizer = build_quantizer({"kind": "affine", "dim": 1, "codes": 3})
    quantizer.code_vectors.weight.data.copy_(torch.tensor([[[-1.5], [-1.0], [-0.5]]]))
    quantizer.latent_mean.fill_(2.0)
    quantizer.latent_variance.fill_(9.0)
    quantizer.code_mean.fill_(-1.0)
    quantizer.code_variance.fill_(0.25)
    quantizer.has_statistics.fill_(True)
    torch.testing.assert_close(quantizer.codebook().flatten(), torch.tensor([-1.0, 2.0, 5.0]))


@pytest.mark.parametrize("groups", [1, 2])
def test_after_the_first_step_codes_have_the_moments_of_the_latents(groups):
    quantizer = build(groups=groups)
    raw = quantizer.code_vectors.weight.detach().clone()
    latents = 50 + 3 * torch.randn(400, 4)
    sync = CodebookSync(quantizer)
    assert torch.equal(quantizer.codebook(), raw)  # no statistics yet: the identity
    for part in latents.split([150, 1, 249]):  # accumulated
        quantizer(part)
    assert torch.equal(quantizer.codebook(), raw)  # forward changes nothing
    sync.step()
    codes = quantizer.codebook()
    split = latents.reshape(400, groups, -1)
    torch.testing.assert_close(codes.mean(dim=1), split.mean(dim=0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(codes.var(dim=1, correction=0), split.var(dim=0, correction=0), atol=1e-3, rtol=1e-4)


def test_later_statistics_come_in_by_the_momentum():
    quantizer = build(affine_momentum=0.25)
    sync = CodebookSync(quantizer)
    first, second = torch.randn(300, 4), 10 + 2 * torch.randn(300, 4)
    for latents in (first, second):
        quantizer(latents)
        sync.step()
    torch.testing.assert_close(quantizer.latent_mean[0, 0], 0.75 * first.mean(0) + 0.25 * second.mean(0))
    expected = 0.75 * first.var(0, correction=0) + 0.25 * second.var(0, correction=0)
    torch.testing.assert_close(quantizer.latent_variance[0, 0], expected, atol=1e-4, rtol=1e-4)


def test_each_block_of_codes_has_a_map_of_its_own():
    quantizer = build(affine_groups=3)
    sync = CodebookSync(quantizer)
    quantizer.code_vectors.weight.data[:, 4:8] += 20  # the second of three contiguous blocks of four
    latents = torch.randn(300, 4)
    quantizer(latents)
    sync.step()
    blocks = quantizer.codebook()[0].reshape(3, 4, 4)
    torch.testing.assert_close(blocks.mean(dim=1), latents.mean(0).expand(3, 4), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("affine", ["learned", "running"])
def test_codes_that_no_token_chose_move_too(affine):
    quantizer = build(affine=affine)
    latents = 3 + 0.1 * torch.randn(40, 4)
    before = quantizer.codebook()
    unused = quantizer(latents).usage[0] == 0
    assert unused.any()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    sum(quantizer(latents).losses.values()).backward()
    raw_gradient = quantizer.code_vectors.weight.grad
    assert bool((raw_gradient[0, unused] == 0).all())
    optimizer.step()
    CodebookSync(quantizer).step()
    assert bool(((quantizer.codebook() - before)[0, unused].abs().amax(dim=1) > 1e-4).all())


def test_learned_steps_are_scaled_by_the_square():
    """s = 1 + a·θ with a = 10: the gradient of θ is 10 times that of s, and a step of θ moves s by another 10."""
    moved = {}
    latents = torch.randn(40, 4)
    for rate in (1.0, 10.0):
        quantizer = build(affine="learned", affine_lr=rate)
        sum(quantizer(latents).losses.values()).backward()
        with torch.no_grad():
            moved[rate] = -rate * quantizer.shift_step.weight.grad
    torch.testing.assert_close(moved[10.0], 100 * moved[1.0])


def test_a_feature_without_variance_does_not_run_away():
    quantizer = build()
    quantizer.code_vectors.weight.data[..., 2] = 0.5
    quantizer(torch.randn(100, 4))
    CodebookSync(quantizer).step()
    scale, _ = quantizer.scale_and_shift()
    assert float(scale.max()) <= 1e3
    assert torch.isfinite(quantizer.codebook()).all()


@pytest.mark.parametrize("options", [{"affine": "learned", "affine_groups": 2}, {"affine": "running", "groups": 2}])
def test_latents_written_as_codes_come_out_unchanged(options):
    """The published layer writes them into C, and the codes become s·z + b (its defect 5)."""
    quantizer = build(**options)
    sync = CodebookSync(quantizer)
    quantizer(5 + 4 * torch.randn(200, 4))
    sync.step()
    for parameter in list(quantizer.parameters())[1:]:
        parameter.data.normal_(std=0.3)
    wanted = torch.randn(quantizer.groups, 12, quantizer.code_dim)
    quantizer.set_codebook(wanted)
    torch.testing.assert_close(quantizer.codebook(), wanted, atol=1e-5, rtol=1e-5)


def test_blocks_must_share_the_codes():
    with pytest.raises(ValueError, match="affine_groups=5 can't share codes=12 equally: use affine_groups=1, 2, 3, 4"):
        build(affine_groups=5)


@pytest.mark.parametrize("affine", ["learned", "running"])
def test_inner_steps_move_the_effective_codes(affine):
    """The published layer steps the raw codes after the map was applied and returns stale codes (its defect 6)."""
    quantizer = build(affine=affine, inner_steps=1, inner_rate=10.0)  # all the way to the means
    sync = CodebookSync(quantizer)
    if affine == "learned":
        quantizer.scale_step.weight.data.fill_(0.7)
        quantizer.shift_step.weight.data.fill_(-0.2)
    latents = 2 + torch.randn(200, 4)
    output = quantizer(latents)
    map_before = [tensor.detach().clone() for tensor in quantizer.scale_and_shift()]
    sync.step()
    scale, shift = map_before
    raw = quantizer.code_vectors.weight.detach()
    for code in range(12):
        members = latents[output.codes[:, 0] == code]
        if len(members):
            torch.testing.assert_close(raw[0, code] * scale[0, 0] + shift[0, 0], members.mean(dim=0), atol=1e-5, rtol=0)


def test_with_inner_steps_the_map_still_learns_and_the_raw_codes_do_not():
    quantizer = build(affine="learned", inner_steps=2)
    sum(quantizer(torch.randn(40, 4)).losses.values()).backward()
    assert quantizer.code_vectors.weight.grad is None
    assert quantizer.scale_step.weight.grad.abs().sum() > 0
    assert quantizer.shift_step.weight.grad.abs().sum() > 0
