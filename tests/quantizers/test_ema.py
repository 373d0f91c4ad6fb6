"""EMA-VQ: what is its own. The published values are in test_ksom.py: EMA-VQ is the map without a neighbourhood."""

import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer

LATENTS = torch.tensor([[0.2, 0.0], [0.1, 0.2], [1.1, 0.0]])
CODES = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]])


def build(count_init=1, update_empty=True):
    quantizer = build_quantizer(
        {"kind": "ema", "dim": 2, "codes": 3, "decay": 0.9, "count_init": count_init, "update_empty": update_empty}
    )
    quantizer.code_vectors.copy_(CODES)
    quantizer.code_sums.copy_(CODES)
    return quantizer


def test_a_step_without_tokens_changes_no_code():
    for update_empty in (True, False):
        quantizer = build(0, update_empty)
        CodebookSync(quantizer).step()
        assert torch.equal(quantizer.codebook(), CODES)


def test_gradients_reach_latents_only():
    quantizer = build()
    latents = LATENTS.clone().requires_grad_()
    output = quantizer(latents)
    assert torch.equal(output.vectors.detach(), CODES[0][[0, 0, 1]])
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    (output.vectors * upstream).sum().backward()
    assert torch.equal(latents.grad, upstream)
    latents.grad = None
    quantizer(latents).losses["commitment"].backward()
    # 0.25 · mean over 6 elements: 2 · 0.25 / 6 · (z − c)
    torch.testing.assert_close(latents.grad, (LATENTS - CODES[0][[0, 0, 1]]) * 0.5 / 6)
    assert not list(quantizer.parameters())


def test_k_means_counts_and_sums_belong_together():
    quantizer = build_quantizer({"kind": "ema", "dim": 2, "codes": 3})
    quantizer.set_codebook(CODES, torch.tensor([[10.0, 2.0, 0.0]]))
    sync = CodebookSync(quantizer)
    quantizer(CODES[0])  # each code sees its own vector once
    sync.step()
    torch.testing.assert_close(quantizer.codebook(), CODES, atol=1e-4, rtol=1e-4)
