"""K-means over the latents of a model: quality, hard cases, and what it leaves alone."""

import pytest
import torch
from torch import nn

from pipeline.codebooks import initialise_codebooks
from pipeline.codebooks.initialise import cluster
from pipeline.quantizers import build_quantizer

CENTRES = 5 * torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


def _clouds(seed, number=64):
    generator = torch.Generator().manual_seed(seed)
    return CENTRES.repeat(number // 16, 1) + 0.05 * torch.randn(number, 4, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "ema"},
        {"kind": "ksom"},
        {"kind": "ste"},
        {"kind": "affine", "affine": "learned"},
        {"kind": "affine", "affine": "running"},
        {"kind": "knn_simplex", "logits": "distance"},
        {"kind": "knn_simplex", "logits": "linear"},
    ],
)
def test_every_cloud_gets_a_code(options):
    torch.manual_seed(0)
    quantizer = build_quantizer({"dim": 4, "codes": 16, **options})
    batches = [_clouds(seed) for seed in range(4)]
    initialise_codebooks(quantizer, batches)
    quantizer.eval()
    output = quantizer(torch.cat(batches))
    assert bool((output.usage > 0).all())
    assert float((output.vectors - torch.cat(batches)).square().mean()) < 0.01
    assert int(quantizer.updates) == 0
    assert all(not bool(pending.any()) for pending in quantizer.pending())


def test_padding_and_modes_are_respected():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.9)
            self.frozen = nn.Dropout(0.5).eval()
            self.quantizer = build_quantizer({"kind": "ema", "dim": 4, "codes": 16})

        def forward(self, batch):
            latents, mask = batch
            return self.quantizer(self.dropout(latents), mask=mask)

    torch.manual_seed(0)
    model = Model().train()
    model.frozen.eval()
    latents = torch.cat([_clouds(0), torch.full((64, 4), 1e4)])
    mask = torch.arange(128) < 64
    initialise_codebooks(model, [(latents, mask)])
    assert float(model.quantizer.codebook().abs().max()) < 30
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training
    distances = torch.cdist(CENTRES, model.quantizer.codebook()[0]).amin(dim=1)
    assert float(distances.max()) < 0.2  # dropout would have spoilt the latents


def test_moving_averages_start_from_counts_and_sums_that_agree():
    quantizer = build_quantizer({"kind": "ema", "dim": 4, "codes": 16})
    initialise_codebooks(quantizer, [_clouds(seed) for seed in range(4)])
    assert float(quantizer.code_counts.sum()) == 256
    torch.testing.assert_close(quantizer.code_sums, quantizer.code_vectors * quantizer.code_counts.unsqueeze(-1))


def test_clusters_are_never_empty_and_the_result_is_repeatable():
    latents = torch.cat([torch.zeros(500, 1, 2), torch.randn(40, 1, 2, generator=torch.Generator().manual_seed(0))])
    first, counts = cluster(latents, 32)
    second, _ = cluster(latents, 32)
    assert torch.equal(first, second)
    assert bool((counts > 0).all())
    assert float(counts.sum()) == 540


@pytest.mark.parametrize(
    ("options", "batches", "method", "message"),
    [
        ({"kind": "ema", "codes": 32}, 1, "lloyd", "method='lloyd' is unknown: use 'kmeans'"),
        ({"kind": "ema", "codes": 100}, 1, "kmeans", "64 distinct latents for 100 codes: bring more batches"),
        ({"kind": "ema", "codes": 32}, 0, "kmeans", "0 distinct latents for 32 codes"),
        ({"kind": "gumbel", "codes": 8}, 1, "kmeans", "of kind gumbel has no codes that k-means can set"),
    ],
)
def test_what_k_means_cannot_do_is_said_and_changes_nothing(options, batches, method, message):
    quantizer = build_quantizer({"dim": 4, **options})
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialise_codebooks(quantizer, [_clouds(seed) for seed in range(batches)], method=method)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name])
