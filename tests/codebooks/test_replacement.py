"""Dead codes: when they die, where they go, and what happens to the optimiser's memory of them."""

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.replacement import Replacement
from pipeline.quantizers import build_quantizer

NEAR = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.0, -0.1]])


def build(kind="ste", **options):
    if kind == "affine":  # running statistics would carry all codes to the latents by themselves
        options["affine"] = "learned"
    quantizer = build_quantizer(
        {"kind": kind, "dim": 2, "codes": 3, "replace_after": 3, "replace_noise": 0.0, **options}
    )
    quantizer.set_codebook(torch.tensor([[[0.0, 0.0], [5.0, 5.0], [-5.0, 5.0]]]).repeat(quantizer.groups, 1, 1))
    return quantizer


def _train(quantizer, steps, micro_batches=2, latents=NEAR):
    sync = CodebookSync(quantizer)
    replaced = []
    for _ in range(steps):
        for _ in range(micro_batches):
            quantizer(latents)
        replaced.append(sync.step().quantizers[0].replaced)
    return replaced


@pytest.mark.parametrize("kind", ["ema", "ste", "affine"])
def test_a_code_moves_after_so_many_unused_steps_to_a_latent(kind):
    """The published rule: with a lifespan of 3, on the third unused step in a row; counted in optimiser steps."""
    quantizer = build(kind)
    assert _train(quantizer, 2) == [0, 0]
    assert quantizer.idle_steps.tolist() == [[0, 2, 2]]
    assert _train(quantizer, 1) == [2]
    for code in quantizer.codebook()[0, 1:]:
        assert (NEAR - code).abs().amax(dim=1).min() < 1e-5
    assert quantizer.idle_steps.tolist() == [[0, 0, 0]]


def test_a_code_that_is_used_again_lives_on():
    quantizer = build()
    sync = CodebookSync(quantizer)
    for latents in (NEAR, NEAR, torch.tensor([[5.0, 4.9], [-4.0, 5.0]]), NEAR, NEAR):
        quantizer(latents)
        assert sync.step().quantizers[0].replaced == 0
    assert quantizer.idle_steps.tolist() == [[0, 2, 2]]


def test_evaluation_and_empty_steps_age_nothing():
    quantizer = build()
    sync = CodebookSync(quantizer)
    for _ in range(5):
        quantizer.eval()(NEAR)
        quantizer.train()(NEAR, torch.zeros(3, dtype=torch.bool))
        sync.step()
    assert quantizer.idle_steps.tolist() == [[0, 0, 0]]


def test_a_replaced_moving_average_stays_where_it_was_put():
    """In a well-known library the next line of the same forward overwrites the replacement by the old average."""
    quantizer = build("ema", decay=0.99)
    _train(quantizer, 3)
    placed = quantizer.codebook().clone()
    sync = CodebookSync(quantizer)
    quantizer(placed[0])  # each code meets a token exactly where it is
    sync.step()
    torch.testing.assert_close(quantizer.codebook(), placed, atol=1e-4, rtol=1e-4)


def test_groups_take_their_own_part_of_a_latent():
    quantizer = build(groups=2, dim=4)
    latents = torch.tensor([[0.1, 0.2, 10.1, 10.2], [0.3, 0.4, 10.3, 10.4]])
    quantizer.code_vectors.weight.data[1] += 10
    assert _train(quantizer, 3, latents=latents) == [0, 0, 4]
    pairs = latents.reshape(2, 2, 2).transpose(0, 1)  # (groups, tokens, 2)
    for group in range(2):
        for code in quantizer.codebook()[group, 1:]:
            assert (pairs[group] - code).abs().amax(dim=1).min() == 0


def test_noise_keeps_codes_apart_when_latents_are_few():
    quantizer = build(replace_noise=0.01)
    one = torch.tensor([[3.0, 4.0]])
    quantizer.set_codebook(torch.tensor([[[3.0, 4.0], [50.0, 5.0], [-50.0, 5.0]]]))
    assert _train(quantizer, 3, micro_batches=1, latents=one) == [0, 0, 2]
    first, second = quantizer.codebook()[0, 1:]
    assert not torch.equal(first, second)
    for code in (first, second):
        assert 0 < float((code - one[0]).norm()) < 5 * 0.01 * 5  # a few standard deviations of 0.01 · |z|


def test_latents_are_kept_only_when_a_code_may_die():
    quantizer = build()
    replacement = Replacement({"": quantizer}, None, None)
    quantizer(NEAR)
    assert len(replacement._samples[""].smallest(2, torch.device("cpu"))[0]) == 0
    replacement.step()
    quantizer.idle_steps.copy_(torch.tensor([[0, 2, 1]]))
    for _ in range(50):
        quantizer(NEAR)
    assert len(replacement._samples[""].smallest(2, torch.device("cpu"))[0]) == 1


def test_recomputed_activations_are_no_forwards():
    """The place of a token in the global batch must not depend on whether activations were recomputed."""
    from torch.utils.checkpoint import checkpoint

    codebooks = []
    for recompute in (False, True):
        torch.manual_seed(0)
        quantizer = build(replace_after=2)
        sync = CodebookSync(quantizer)
        for step in range(2):
            for number in range(3):
                latents = NEAR + step + 0.1 * number
                latents.requires_grad_()
                if recompute:
                    checkpoint(lambda z, q=quantizer: q(z).vectors.sum(), latents, use_reentrant=False).backward()
                else:
                    quantizer(latents).vectors.sum().backward()
            health = sync.step()
        assert health.quantizers[0].replaced > 0
        codebooks.append(quantizer.codebook())
    assert torch.equal(*codebooks)


def test_the_optimiser_forgets_dead_codes():
    quantizer = build()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.01)
    sync = CodebookSync(quantizer, optimizer=optimizer)
    for step in range(4):
        latents = NEAR if step else torch.tensor([[0.0, 0.1], [5.0, 4.0], [-5.0, 4.0]])
        optimizer.zero_grad()
        sum(quantizer(latents).losses.values()).backward()
        optimizer.step()
        health = sync.step()
    assert health.quantizers[0].replaced == 2
    moments = optimizer.state[quantizer.code_vectors.weight]["exp_avg"][0]
    assert moments[0].abs().sum() > 0
    assert not moments[1:].any()
