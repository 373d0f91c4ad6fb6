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


@pytest.mark.parametrize("kind", ["ema", "ksom", "gd_som", "ste", "affine"])
def test_levels_are_fitted_to_what_the_levels_before_them_leave_over(kind):
    """Centres ± offsets that are small beside them: the first level finds the centres, the second the offsets."""
    torch.manual_seed(0)
    offsets = torch.tensor([[0.2, 0, 0, 0], [-0.2, 0, 0, 0], [0, 0.1, 0, 0], [0, -0.1, 0, 0]])
    points = (CENTRES[:4, None] + offsets).reshape(16, 4)
    quantizer = build_quantizer({"kind": "residual", "dim": 4, "codes": 4, "levels": 2, "level": {"kind": kind}})
    quantizer.train()
    initialise_codebooks(quantizer, [points, points.flip(0)])
    first, second = quantizer.codebook()
    assert float(torch.cdist(CENTRES[:4], first).amin(dim=1).max()) < 1e-5
    assert float(torch.cdist(offsets, second).amin(dim=1).max()) < 1e-5
    torch.testing.assert_close(quantizer.decode(quantizer.encode(points)), points, atol=1e-5, rtol=0)
    assert quantizer.training
    assert all(not bool(pending.any()) for level in quantizer.levels for pending in level.pending())


def test_counts_of_levels_are_those_of_the_sample():
    quantizer = build_quantizer({"kind": "residual", "dim": 4, "codes": 16, "levels": 3})
    initialise_codebooks(quantizer, [_clouds(seed) for seed in range(4)])
    for level in quantizer.levels:
        assert float(level.code_counts.sum()) == 256


def test_a_quantizer_that_fails_leaves_those_before_it_as_they_were():
    """The residuals of 16 distinct latents in 16 codes are all 0: the first level can be fitted, the second can't."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain = build_quantizer({"kind": "ema", "dim": 4, "codes": 16})
            self.residual = build_quantizer({"kind": "residual", "dim": 4, "codes": 16, "levels": 2})

        def forward(self, batch):
            return self.plain(batch), self.residual(batch)

    torch.manual_seed(0)
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="k-means found 1 distinct latents for 16 codes"):
        initialise_codebooks(model, [CENTRES.repeat(4, 1)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


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
        ({"kind": "lfq", "codes": 16}, 1, "kmeans", "of kind lfq has no codes that k-means can set"),
        ({"kind": "residual", "level": {"kind": "simvq"}}, 1, "kmeans", "of kind simvq has no codes that k-means can"),
    ],
)
def test_what_k_means_cannot_do_is_said_and_changes_nothing(options, batches, method, message):
    quantizer = build_quantizer({"dim": 4, **options})
    before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialise_codebooks(quantizer, [_clouds(seed) for seed in range(batches)], method=method)
    for name, tensor in quantizer.state_dict().items():
        assert torch.equal(tensor, before[name])
