"""Samples by keyed hash: what is chosen depends on places in the global batch alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.codebooks.sample import LatentSample, merge, pack, unpack
from pipeline.quantizers.keys import token_keys

CPU = torch.device("cpu")


def test_keys_are_distinct_repeatable_and_even():
    keys = token_keys(100_000, 1, 2, 3)
    assert torch.equal(keys, token_keys(100_000, 1, 2, 3))
    assert len(keys.unique()) == 100_000
    assert bool((keys >= 0).all())
    assert not (set(token_keys(1000, 1, 2, 4).tolist()) & set(keys.tolist()))
    assert not (set(token_keys(1000, 2, 1, 3).tolist()) & set(keys.tolist()))
    eighths = torch.bincount((keys >> 60).long(), minlength=8) / 100_000
    assert float((eighths - 0.125).abs().max()) < 0.005


def test_keys_of_a_token_do_not_depend_on_those_after_it():
    assert torch.equal(token_keys(5, 1, 2), token_keys(50, 1, 2)[:5])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 20), st.randoms(use_true_random=False))
def test_any_order_and_any_division_choose_the_same(lengths, size, random):
    batches = [torch.randn(length, 3, generator=torch.Generator().manual_seed(n)) for n, length in enumerate(lengths)]
    alone = LatentSample(size, 7)
    for number, latents in enumerate(batches):
        alone.add(latents, number)
    expected = alone.gather(3, CPU)
    assert len(expected) == min(size, sum(lengths))

    parts = [LatentSample(size, 7), LatentSample(size, 7)]
    order = list(enumerate(batches))
    random.shuffle(order)
    for place, (number, latents) in enumerate(order):
        parts[place % 2].add(latents, number)
    packed = torch.cat([pack(*part.smallest(3, CPU), size) for part in parts])
    assert torch.equal(merge(*unpack(packed), size), expected)


def test_packing_keeps_every_bit():
    keys = torch.tensor([1, 2**62 + 1, 2**63 - 2])
    latents = torch.tensor([[float("nan"), -0.0], [1e-42, 3.0], [float("inf"), 0.1]])
    unpacked_keys, unpacked = unpack(pack(keys, latents, 4))
    assert torch.equal(unpacked_keys[:3], keys)
    assert torch.equal(unpacked[:3].view(torch.int32), latents.view(torch.int32))
    assert len(merge(unpacked_keys, unpacked, 4)) == 3  # the row of padding is no latent
