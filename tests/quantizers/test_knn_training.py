"""What the K-nearest-neighbour regulariser is for, on a small autoencoder (specification, table of section 4.5)."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.quantizers import build_quantizer


def _train(weight: float, steps: int) -> tuple[float, float]:
    """An autoencoder of Gaussian classes: share of codes in use, and the error with single codes over the error with
    the mixtures that it was trained on."""
    torch.manual_seed(0)
    centres = torch.randn(32, 16)
    data = centres[torch.randint(32, (8192,))] + 0.1 * torch.randn(8192, 16)
    encoder, decoder = (
        nn.Sequential(nn.Linear(a, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, b))
        for a, b in ((16, 8), (8, 16))
    )
    quantizer = build_quantizer({"kind": "knn_simplex", "dim": 8, "codes": 64, "logits": "distance", "weight": weight})
    optimizer = torch.optim.AdamW(nn.ModuleList([encoder, quantizer, decoder]).parameters(), lr=1e-3)
    for _ in range(steps):
        batch = data[torch.randint(8192, (512,))]
        out = quantizer(encoder(batch))
        loss = (decoder(out.vectors) - batch).square().mean() + out.losses["knn"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        soft = (decoder(quantizer.train()(encoder(data)).vectors) - data).square().mean()
        single = quantizer.eval()(encoder(data))
        hard = (decoder(single.vectors) - data).square().mean()
    return float((single.usage > 0).float().mean()), float(hard / soft)


def test_every_code_is_used_and_single_codes_do_nearly_as_well_as_mixtures():
    usage, gap = _train(weight=0.1, steps=1500)
    assert usage == 1.0
    assert gap < 3


def test_without_it_the_decoder_relies_on_mixtures_and_codes_lie_idle():
    usage, gap = _train(weight=0.0, steps=600)
    assert usage < 0.8
    assert gap > 10
