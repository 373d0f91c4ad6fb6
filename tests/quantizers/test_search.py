"""The search against float64 distances: ties, tiles, odd sizes, far-off centres and runaway codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.quantizers import search
from pipeline.quantizers.search import first_maximum, highest_scores, nearest_codes


def _exact(latents, codebook):
    distances = torch.cdist(latents.double().transpose(0, 1), codebook.double())
    return distances.argmin(dim=2).T


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(2, 300), st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
def test_nearest_of_any_size(tokens, codes, groups, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(tokens, groups, dim, generator=generator)
    codebook = torch.randn(groups, codes, dim, generator=generator)
    found = nearest_codes(latents, codebook)
    assert found.shape == (tokens, groups)
    distance = (latents - codebook[torch.arange(groups), found]).square().sum(-1).double()
    best = torch.cdist(latents.double().transpose(0, 1), codebook.double()).square().amin(dim=2).T
    torch.testing.assert_close(distance, best, atol=1e-5, rtol=1e-5)


def test_of_equal_codes_the_first_is_taken():
    codebook = torch.randn(1, 300, 4, generator=torch.Generator().manual_seed(0))
    codebook[0, 70:] = codebook[0, 3]
    codebook[0, 200:210] = codebook[0, 5]
    assert nearest_codes(codebook[0, [3, 250, 5, 205]].unsqueeze(1), codebook).flatten().tolist() == [3, 3, 5, 5]
    assert nearest_codes(torch.zeros(3, 1, 2), torch.zeros(1, 200, 2)).flatten().tolist() == [0, 0, 0]


def test_several_tiles_give_what_one_gives(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(700, 2, 16, generator=generator), torch.randn(2, 500, 16, generator=generator)
    whole = nearest_codes(latents, codebook)
    monkeypatch.setattr(search, "TILE_ELEMENTS", {"cpu": 64 * 128, "cuda": 64 * 128})
    assert torch.equal(nearest_codes(latents, codebook), whole)  # 11 tiles of rows, 4 of codes
    assert torch.equal(whole, _exact(latents, codebook))


def test_a_token_gets_the_same_code_in_any_company():
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(500, 1, 64, generator=generator), torch.randn(1, 300, 64, generator=generator)
    latents = (latents + codebook[:, :1]) / 2
    together = nearest_codes(latents, codebook)
    for start, stop in ((0, 1), (3, 10), (100, 164), (37, 500)):
        assert torch.equal(nearest_codes(latents[start:stop], codebook), together[start:stop])


def test_far_from_the_origin_no_digit_is_lost():
    generator = torch.Generator().manual_seed(0)
    latents = 100 + 0.1 * torch.randn(400, 1, 32, generator=generator)
    codebook = 100 + 0.1 * torch.randn(1, 200, 32, generator=generator)
    assert torch.equal(nearest_codes(latents, codebook), _exact(latents, codebook))


def test_a_runaway_code_spoils_no_distance():
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(400, 1, 8, generator=generator), torch.randn(1, 20, 8, generator=generator)
    codebook[0, 7] = 3e7
    assert torch.equal(nearest_codes(latents, codebook), _exact(latents, codebook))


@pytest.mark.parametrize("codes", [2, 64, 65, 129])
def test_highest_scores(codes):
    generator = torch.Generator().manual_seed(codes)
    latents, weights = torch.randn(90, 6, generator=generator), torch.randn(codes, 6, generator=generator)
    bias = torch.randn(codes, generator=generator) - 50  # codes of padding must not win against negative scores
    assert torch.equal(highest_scores(latents, weights, bias), (latents @ weights.T + bias).argmax(dim=1))


def test_both_ways_to_the_first_maximum_agree(monkeypatch):
    scores = torch.randint(0, 40, (500, 192), generator=torch.Generator().manual_seed(0)).float()  # full of ties
    scores[3] = -torch.inf
    scores[3, 70] = -1e30
    by_numpy = first_maximum(scores)
    monkeypatch.setattr(search, "FEW_THREADS", 0)
    assert torch.equal(first_maximum(scores), by_numpy)
    assert torch.equal(by_numpy, scores.argmax(dim=1))


def test_scratch_memory_outlives_inference_mode():
    latents, codebook = torch.randn(10, 1, 4), torch.randn(1, 5, 4)
    search._kept.__dict__.clear()
    with torch.inference_mode():
        found = nearest_codes(latents, codebook)
    assert torch.equal(nearest_codes(latents, codebook), found)


def test_latents_of_half_precision_are_compared_in_fp32():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(200, 2, 16, generator=generator).bfloat16()
    codebook = torch.randn(2, 70, 16, generator=generator)
    assert torch.equal(nearest_codes(latents, codebook), nearest_codes(latents.float(), codebook))
