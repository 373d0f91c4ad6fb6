"""Finite scalar quantization: the paper's golden values, its code numbers, and what is refused."""

import math

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.fsq import PUBLISHED_LEVELS


def build(**options):
    torch.manual_seed(0)
    return build_quantizer({"kind": "fsq", "dim": 4, "levels": [8, 5, 5, 5], **options})


@pytest.mark.parametrize(
    ("latent", "values", "code"),
    [
        ([0, 0, 0, 0], [0, 0, 0, 0], 500),
        ([0.3, -0.7, 1.2, 0.05], [0.25, -0.5, 1, 0], 573),
        ([10, 10, 10, 10], [0.75, 1, 1, 1], 999),
        ([-10, -10, -10, -10], [-1, -1, -1, -1], 0),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_golden_values(latent, values, code, training):
    quantizer = build().train(training)
    output = quantizer(torch.tensor([latent], dtype=torch.float32))
    assert output.vectors.tolist() == [values]
    assert output.codes.tolist() == [[code]]
    assert output.losses == {}


@pytest.mark.parametrize("levels", [[3, 4], [7, 4, 5], [8, 6, 5]])
def test_every_code_is_its_own_nearest(levels):
    """Codes count through the whole grid, and a latent that is bounded to a code's values gets that code."""
    quantizer = build(dim=len(levels), levels=levels)
    codebook = quantizer.codebook()[0]
    assert quantizer.codes == math.prod(levels) == len(codebook.unique(dim=0))
    for feature, number in enumerate(levels):
        assert len(codebook[:, feature].unique()) == number
    assert quantizer.assign(codebook).squeeze(1).tolist() == list(range(quantizer.codes))


@pytest.mark.parametrize("levels", [[3, 4], [8, 5, 5, 5], [1001], [1002, 3], [3, 3000]])
def test_codes_stay_in_the_codebook(levels):
    """Other implementations give numbers beyond it, or below 0 (vector-quantize-pytorch, issues 139, 207, 240)."""
    quantizer = build(dim=len(levels), levels=levels)
    far = torch.tensor([-1e30, -50.0, -9.0, 9.0, 50.0, 1e30]).unsqueeze(1).expand(-1, len(levels))
    output = quantizer(far.clone().requires_grad_())
    assert output.codes.flatten().tolist() == 3 * [0] + 3 * [quantizer.codes - 1]
    torch.testing.assert_close(quantizer.decode(output.codes), output.vectors.detach(), atol=0, rtol=0)


def test_an_autoencoder_learns_through_it():
    """8 clouds in 6 dimensions through a grid of 27 codes: the error falls to that of the clouds' own noise."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    centres = 2 * torch.randn(8, 6, generator=generator)
    encoder = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    decoder = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 6))
    quantizer = build(dim=3, levels=[3, 3, 3])
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-2)
    errors = []
    for _ in range(300):
        batch = centres[torch.randint(8, (64,), generator=generator)]
        batch = batch + 0.1 * torch.randn(64, 6, generator=generator)
        output = quantizer(encoder(batch))
        error = (decoder(output.vectors) - batch).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[0] > 1
    assert sum(errors[-20:]) / 20 < 0.05
    assert int((output.usage > 0).sum()) >= 8


def test_the_gradient_is_that_of_the_bounding():
    quantizer = build().double()
    latents = torch.randn(6, 4, dtype=torch.float64)
    weights = torch.randn(6, 4)
    passed = latents.clone().requires_grad_()
    (quantizer(passed).vectors * weights).sum().backward()

    bounded = latents.clone().requires_grad_()
    half = torch.tensor([7, 4, 4, 4]) * 1.001 / 2
    offset = torch.tensor([0.5, 0, 0, 0])
    by_hand = (torch.tanh(bounded + torch.atanh(offset / half)) * half - offset) / torch.tensor([4, 2, 2, 2])
    (by_hand * weights).sum().backward()
    torch.testing.assert_close(passed.grad, bounded.grad, atol=1e-6, rtol=1e-5)


def test_latents_of_another_size_are_mapped_to_the_grid_and_back():
    quantizer = build(dim=10, groups=2)
    assert (quantizer.codebook_dim, quantizer.groups, quantizer.codes) == (8, 2, 1000)
    latents = torch.randn(3, 5, 10).requires_grad_()
    output = quantizer(latents)
    assert (output.vectors.shape, output.codes.shape) == ((3, 5, 10), (3, 5, 2))
    torch.testing.assert_close(quantizer.decode(output.codes), output.vectors.detach())
    output.vectors.square().sum().backward()
    for tensor in (latents, *quantizer.parameters()):
        assert tensor.grad.abs().sum() > 0


def test_half_precision_latents_reach_every_code():
    """bf16 can't tell codes beyond 256 apart; ours are integers, and latents are compared in fp32."""
    quantizer = build().eval()
    half = (quantizer.levels - 1) * 1.001 / 2
    offset = torch.where(quantizer.levels % 2 == 0, 0.5, 0.0)
    bounded = quantizer.codebook()[0] * (quantizer.levels // 2)
    latents = torch.atanh((bounded + offset) / half) - torch.atanh(offset / half)  # the inverse of the bounding
    codes = quantizer.bfloat16().encode(latents.bfloat16())
    assert codes.squeeze(1).tolist() == list(range(1000))


@pytest.mark.parametrize("codes", PUBLISHED_LEVELS)
def test_the_papers_levels_for_a_number_of_codes(codes):
    levels = PUBLISHED_LEVELS[codes]
    quantizer = build_quantizer({"kind": "fsq", "dim": len(levels), "codes": codes})
    assert quantizer.levels.tolist() == list(levels)
    assert quantizer.codes == pytest.approx(codes, rel=0.07)
    again = build_quantizer({"kind": "fsq", "dim": len(levels), "codes": quantizer.codes})
    assert again.levels.tolist() == list(levels)


def test_usage_is_counted_over_the_step():
    quantizer = build()
    sync = CodebookSync(quantizer)
    quantizer(torch.zeros(3, 4))
    quantizer(10 * torch.ones(1, 4))
    health = sync.step().quantizers[0]
    assert health.tokens == 4
    assert health.unused == [998]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": [8, 2]}, r"levels=\[8, 2\]: use 3 values a feature or more, .* or kind=lfq for 2"),
        ({"levels": []}, "use 3 values a feature or more"),
        ({"codes": 999}, r"codes=999 is not the 1000 of levels=\[8, 5, 5, 5\]: use codes=1000"),
        ({"levels": None, "codes": 512}, "codes=512 has no published levels: use codes=256, 1024, 4096"),
        ({"replace_after": 5}, "unknown option"),
    ],
)
def test_what_makes_no_grid_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_codes_of_a_grid_cannot_be_set():
    with pytest.raises(ValueError, match="quantizer kind fsq has no codes that can be set"):
        build().set_codebook(torch.zeros(1, 1000, 4))
