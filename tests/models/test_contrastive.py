"""The contrastive objective against its definition, and where a codebook makes it meaningless."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from pipeline.data.masking import draw_negatives
from pipeline.models.contrastive import contrast

TEMPERATURE = 0.1
NEGATIVES = 12


def draw(counts, negatives=NEGATIVES, seed=0):
    """Distractors as the loader brings them: zeros behind an utterance's last masked frame."""
    generator = np.random.default_rng(seed)
    drawn = torch.zeros(len(counts), max(counts), negatives, dtype=torch.int64)
    for row, count in enumerate(counts):
        drawn[row, :count] = torch.from_numpy(draw_negatives(count, negatives, generator))
    return drawn


def vectors_of_codes(frames, codes, dim=8):
    """Quantized vectors of random codes: many frames share one."""
    return torch.randn(codes, dim)[torch.randint(codes, (frames,))]


def reference(context, targets, quantized, counts, negatives, temperature):
    """Equation 3 frame by frame: distractors' vectors gathered, cosine by torch, cross-entropy over the valid ones."""
    loss, correct, asked, valid = torch.zeros(()), 0, 0, 0
    start = 0
    for row, count in enumerate(counts):
        for n in range(count):
            others = [start + int(place) for place in negatives[row, n]]
            others = [place for place in others if not torch.equal(quantized[place], quantized[start + n])]
            valid += len(others)
            if not others:
                continue
            candidates = targets[[start + n, *others]]
            logits = torch.cosine_similarity(context[start + n].expand_as(candidates), candidates) / temperature
            loss = loss + functional.cross_entropy(logits.unsqueeze(0), torch.zeros(1, dtype=torch.int64))
            correct += int(logits[0] > logits[1:].max())
            asked += 1
        start += count
    return loss, correct, asked, valid


@pytest.mark.parametrize("codes", [3, 40])
def test_it_is_the_papers_equation(codes):
    torch.manual_seed(0)
    counts = [17, 5, 30]
    negatives = draw(counts)
    quantized = vectors_of_codes(sum(counts), codes)
    projection = torch.randn(8, 6)
    context = (quantized @ projection + torch.randn(sum(counts), 6)).requires_grad_()
    targets = (quantized @ projection).requires_grad_()
    found = contrast(context, targets, quantized, counts, negatives, TEMPERATURE)
    loss, correct, asked, valid = reference(context, targets, quantized, counts, negatives, TEMPERATURE)
    torch.testing.assert_close(found.loss, loss, rtol=1e-5, atol=1e-5)
    assert (int(found.correct), int(found.valid_targets), int(found.valid_negatives)) == (correct, asked, valid)
    assert 0 < correct < asked
    assert int(found.negatives) == sum(counts) * NEGATIVES
    expected = torch.autograd.grad(loss, [context, targets])
    actual = torch.autograd.grad(found.loss, [context, targets])
    for gradient, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_padding_of_the_negatives_and_other_utterances_change_nothing():
    """Utterance by utterance or all at once; and what stands behind the last masked frame is never read."""
    torch.manual_seed(1)
    counts = [4, 21, 9]
    negatives = draw(counts)
    context, targets = torch.randn(sum(counts), 6), torch.randn(sum(counts), 6)
    together = contrast(context, targets, targets, counts, negatives, TEMPERATURE)
    alone = torch.zeros(())
    start = 0
    for row, count in enumerate(counts):
        part = slice(start, start + count)
        rows = negatives[row : row + 1, :count]
        alone += contrast(context[part], targets[part], targets[part], [count], rows, TEMPERATURE).loss
        start += count
    torch.testing.assert_close(together.loss, alone)
    for row, count in enumerate(counts):
        negatives[row, count:] = 10_000
    assert torch.equal(contrast(context, targets, targets, counts, negatives, TEMPERATURE).loss, together.loss)


def test_utterances_with_nothing_to_tell_apart_add_nothing():
    """Rows with no or one masked frame, before, between and behind others."""
    torch.manual_seed(5)
    counts = [0, 6, 1, 13, 1]
    negatives = torch.zeros(len(counts), max(counts), NEGATIVES, dtype=torch.int64)
    negatives[[1, 3]] = draw([6, 13])
    context, targets = torch.randn(21, 6, requires_grad=True), torch.randn(21, 6)
    found = contrast(context, targets, targets, counts, negatives, TEMPERATURE)
    kept = [*range(6), *range(7, 20)]
    expected = contrast(context[kept], targets[kept], targets[kept], [6, 13], negatives[[1, 3]], TEMPERATURE)
    torch.testing.assert_close(found.loss, expected.loss)
    assert int(found.valid_targets) == int(expected.valid_targets) == 19
    assert int(found.negatives) == 19 * NEGATIVES
    found.loss.backward()
    assert not context.grad[[6, 20]].any()
    assert (context.grad[kept].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("frames", [5, 57])
@pytest.mark.parametrize("dim", [6, 256])
def test_ties_are_wrong(frames, dim):
    """Different codes that the projection makes equal: no frame is told from another, whatever products round to."""
    torch.manual_seed(5)
    context, targets = torch.randn(frames, dim), torch.randn(1, dim).repeat(frames, 1)
    found = contrast(context, targets, torch.randn(frames, 8), [frames], draw([frames]), TEMPERATURE)
    assert int(found.correct) == 0
    assert int(found.valid_targets) == frames
    assert float(found.loss / frames) == pytest.approx(math.log(NEGATIVES + 1), rel=1e-4)


def test_unrelated_vectors_cost_the_logarithm_of_the_candidates():
    torch.manual_seed(2)
    counts = [400, 400]
    context, targets = torch.randn(800, 512), torch.randn(800, 512)
    found = contrast(context, targets, targets, counts, draw(counts, 30), temperature=1.0)
    assert float(found.loss / found.valid_targets) == pytest.approx(math.log(31), rel=0.01)
    assert float(found.correct / found.valid_targets) == pytest.approx(1 / 31, abs=0.02)


def test_a_collapsed_codebook_is_not_counted_as_success():
    """With one code every distractor equals its positive. Elsewhere that reads as loss 0 and accuracy 1."""
    counts = [20, 11]
    context = torch.randn(31, 6, requires_grad=True)
    targets = torch.ones(31, 6, requires_grad=True)
    found = contrast(context, targets, torch.ones(31, 8), counts, draw(counts), TEMPERATURE)
    assert (int(found.correct), int(found.valid_targets), int(found.valid_negatives)) == (0, 0, 0)
    assert found.loss.item() == 0.0
    found.loss.backward()
    assert torch.equal(context.grad, torch.zeros_like(context))
    assert torch.equal(targets.grad, torch.zeros_like(targets))


def test_a_frame_without_a_valid_distractor_leaves_the_others_alone():
    """Frames 0–9 hold one code and frame 10 another; frames that drew only their own code ask nothing."""
    torch.manual_seed(3)
    quantized = torch.cat([torch.ones(10, 4), torch.zeros(1, 4)])
    negatives = torch.ones(1, 11, 3, dtype=torch.int64)
    negatives[0, :5, 0] = 10  # five of the ten drew frame 10 once
    context, targets = torch.randn(11, 6, requires_grad=True), torch.randn(11, 6)
    found = contrast(context, targets, quantized, [11], negatives, TEMPERATURE)
    assert int(found.valid_targets) == 6
    assert int(found.valid_negatives) == 5 + 3
    found.loss.backward()
    assert torch.isfinite(context.grad).all()
    assert context.grad[5:10].abs().sum() == 0
    assert (context.grad[:5].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("counts", [[1], [0, 0], [1, 0]])
def test_too_few_masked_frames_give_zero_with_a_gradient(counts):
    context = torch.randn(sum(counts), 6, requires_grad=True)
    targets = torch.randn(sum(counts), 6, requires_grad=True)
    negatives = torch.zeros(len(counts), max(counts), NEGATIVES, dtype=torch.int64)
    found = contrast(context, targets, torch.randn(sum(counts), 8), counts, negatives, TEMPERATURE)
    assert found.loss.item() == 0.0
    assert int(found.valid_targets) == 0
    found.loss.backward()
    assert context.grad is not None


def test_autocast_does_not_reach_the_cosines():
    """At κ = 0.1 a cosine's bf16 rounding would move a logit by 0.04."""
    torch.manual_seed(4)
    counts = [50]
    context, targets, negatives = torch.randn(50, 16), torch.randn(50, 16), draw(counts)
    expected = contrast(context, targets, targets, counts, negatives, TEMPERATURE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrast(context, targets, targets, counts, negatives, TEMPERATURE)
    assert torch.equal(found.loss, expected.loss)
