"""The pass for all of it at once against one operation at a time."""

import pytest
import torch

from pipeline.quantizers import commitment
from pipeline.quantizers.base import look_up, mean_square, straight_through
from pipeline.quantizers.commitment import commit


def step_by_step(latents, codebook, codes):
    vectors = look_up(codebook, codes).reshape(latents.shape)
    return straight_through(latents, vectors), mean_square(vectors - latents)


@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 17])
def test_values_and_gradients(tokens, chunk, monkeypatch):
    monkeypatch.setattr(commitment, "CHUNK_ELEMENTS", {"cpu": chunk})
    generator = torch.Generator().manual_seed(tokens)
    latents = torch.randn(tokens, 12, generator=generator, requires_grad=True)
    codebook = torch.randn(3, 7, 4, generator=generator)
    codes = torch.randint(0, 7, (tokens, 3), generator=generator)
    upstream = torch.randn(tokens, 12, generator=generator)
    vectors, loss = commit(latents, codebook, codes)
    expected_vectors, expected_loss = step_by_step(latents, codebook, codes)
    assert torch.equal(vectors, expected_vectors)
    torch.testing.assert_close(loss, expected_loss)
    for weights in ((1.0, 0.0), (0.0, 0.3), (1.0, 0.3)):
        ours, theirs = (
            torch.autograd.grad(weights[0] * (a * upstream).sum() + weights[1] * b, latents, retain_graph=True)[0]
            for a, b in ((vectors, loss), (expected_vectors, expected_loss))
        )
        torch.testing.assert_close(ours, theirs)


def test_each_output_alone():
    latents = torch.randn(5, 4, requires_grad=True)
    codebook, codes = torch.randn(1, 3, 4), torch.tensor([[0], [2], [1], [1], [0]])
    vectors, loss = commit(latents, codebook, codes)
    upstream = torch.randn(5, 4)
    assert torch.equal(torch.autograd.grad(vectors, latents, upstream, retain_graph=True)[0], upstream)
    (gradient,) = torch.autograd.grad(loss, latents)
    torch.testing.assert_close(gradient, 2 / 20 * (latents - codebook[0, codes[:, 0]]))


def test_gradient_in_float64():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    codebook = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator)
    codes = torch.randint(0, 3, (6, 2), generator=generator)
    assert torch.autograd.gradcheck(lambda z: commit(z, codebook, codes)[1], latents)
    assert torch.autograd.gradgradcheck(lambda z: commit(z, codebook, codes)[1], latents)


def test_nothing_reaches_the_codebook():
    codebook = torch.randn(1, 3, 4, requires_grad=True)
    latents = torch.randn(2, 4, requires_grad=True)
    vectors, loss = commit(latents, codebook, torch.zeros(2, 1, dtype=torch.int64))
    (vectors.sum() + loss).backward()
    assert codebook.grad is None
