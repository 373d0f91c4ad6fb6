"""EMA-VQ and the Kohonen map, against values of the published layer (specification, section 1.8)."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipeline.codebooks import CodebookSync
from pipeline.codebooks.topology import grid_correlation
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.ema import EMAConfig, EMAQuantizer
from pipeline.quantizers.ksom import KSOMConfig, KSOMQuantizer

BATCH = torch.tensor([[0.2, 0.0], [0.1, 0.2], [1.1, 0.0]])
START = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [4.0, 0.0]]])
# neighbourhood, update_empty, count_init: counts and codes after a step, the second step's codes
GOLDEN = {
    ("none", True, 0): (
        [0.19999, 0.1, 0.00001],
        [[0.150008, 0.100005], [10.099999, 0], [360036.03, 0]],
        [0, 0, 0],
    ),
    ("none", True, 1): ([1.099999, 1.0, 0.900001], [[0.027273, 0.018182], [1.01, 0], [3.999995, 0]], [0, 0, 1]),
    ("hard", True, 0): (
        [0.299997, 0.299997, 0.100006],
        [[0.466671, 0.066667], [3.466699, 0.066667], [37.097878, 0]],
        [0, 0, 0],
    ),
    ("hard", True, 1): (
        [1.199999, 1.199999, 1.000001],
        [[0.116667, 0.016667], [0.866667, 0.016667], [3.709995, 0]],
        [0, 0, 1],
    ),
    ("exponential", True, 1): (
        [1.190484, 1.180967, 1.15423],
        [[0.108806, 0.0168], [0.878217, 0.015324], [3.226474, 0.014187]],
        [0, 0, 1],
    ),
    ("none", False, 0): ([0.2, 0.1, 0], [[0.15, 0.1], [10.1, 0], [4, 0]], [0, 0, 0]),
    ("none", False, 1): ([1.1, 1, 1], [[0.027273, 0.018182], [1.01, 0], [4, 0]], [0, 0, 1]),
    ("hard", False, 1): ([1.2, 1.2, 1.0], [[0.116667, 0.016667], [0.866667, 0.016667], [3.71, 0]], [0, 0, 1]),
}


def _build(**options) -> EMAQuantizer:
    torch.manual_seed(0)
    quantizer = build_quantizer({"kind": "ksom", "dim": 2, "codes": 3, "decay": 0.9, **options})
    assert isinstance(quantizer, EMAQuantizer)
    return quantizer


def _start(quantizer: EMAQuantizer, codes: Tensor = START) -> EMAQuantizer:
    quantizer.code_vectors.copy_(codes)
    quantizer.code_sums.copy_(codes)
    return quantizer


@pytest.mark.parametrize(("case", "expected"), GOLDEN.items())
def test_golden_step(case, expected):
    neighbourhood, update_empty, count_init = case
    counts, codes, next_codes = expected
    quantizer = _start(_build(grid=[3], neighbourhood=neighbourhood, update_empty=update_empty, count_init=count_init))
    out = quantizer(BATCH)
    assert out.codes.flatten().tolist() == [0, 0, 1]
    assert torch.equal(out.vectors, START[0, [0, 0, 1]])  # of the codes before the update
    assert float(out.losses["commitment"]) == pytest.approx(0.004167, abs=1e-6)
    health = CodebookSync(quantizer).step()
    assert health.summary()["codebook_perplexity"] == pytest.approx(1.889882, abs=1e-5)
    torch.testing.assert_close(quantizer.code_counts[0], torch.tensor(counts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.codebook()[0], torch.tensor(codes, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    assert quantizer(BATCH).codes.flatten().tolist() == next_codes


def test_golden_second_step():
    quantizer = _start(_build(grid=[3]))
    sync = CodebookSync(quantizer)
    quantizer(BATCH)
    sync.step()
    out = quantizer(BATCH)
    assert float(out.losses["commitment"]) == pytest.approx(0.003993, abs=1e-6)
    sync.step()
    counts, codes = [1.370907, 1.361817, 0.990912], [[0.186738, 0.027719], [0.788118, 0.026569], [3.470539, 0]]
    torch.testing.assert_close(quantizer.code_counts[0], torch.tensor(counts), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.codebook()[0], torch.tensor(codes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("update_empty", [True, False])
def test_a_map_without_a_neighbourhood_is_ema_to_the_bit(update_empty):
    shared = {"dim": 6, "codes": 12, "groups": 2, "decay": 0.8, "update_empty": update_empty}
    pair = []
    for options in ({"kind": "ema"}, {"kind": "ksom", "neighbourhood": "none"}):
        torch.manual_seed(0)
        quantizer = build_quantizer({**shared, **options})
        sync = CodebookSync(quantizer)
        for step in range(4):
            quantizer(torch.randn(50, 6, generator=torch.Generator().manual_seed(step)))
            sync.step()
        pair.append(quantizer.state_dict())
    torch.testing.assert_close(pair[0], pair[1], rtol=0, atol=0)


def test_a_neighbourhood_that_has_shrunk_away_is_ema():
    pair = []
    for neighbourhood in ("none", "hard"):
        quantizer = _start(_build(grid=[3], neighbourhood=neighbourhood, shrink_step=1e300))
        quantizer.updates.fill_(100)
        quantizer(BATCH)
        CodebookSync(quantizer).step()
        pair.append(quantizer.codebook())
    assert torch.equal(*pair)


def test_groups_are_maps_of_their_own():
    whole = build_quantizer({"kind": "ksom", "dim": 8, "codes": 6, "groups": 2, "decay": 0.9})
    latents = torch.randn(40, 8)
    halves = []
    for group in range(2):
        half = build_quantizer({"kind": "ksom", "dim": 4, "codes": 6, "decay": 0.9})
        assert isinstance(half, EMAQuantizer)
        _start(half, whole.codebook()[group : group + 1])
        half(latents[:, 4 * group : 4 * group + 4])
        CodebookSync(half).step()
        halves.append(half.codebook())
    whole(latents)
    CodebookSync(whole).step()
    torch.testing.assert_close(whole.codebook(), torch.cat(halves), rtol=1e-6, atol=1e-6)


def test_time_is_counted_in_optimiser_steps():
    quantizer = _start(_build(grid=[3]))
    for _ in range(5):
        quantizer(BATCH)
    assert int(quantizer.updates) == 0
    CodebookSync(quantizer).step()
    assert int(quantizer.updates) == 1


def test_codes_get_no_gradient_and_latents_theirs_straight_through():
    quantizer = _start(_build(grid=[3]))
    latents = BATCH.clone().requires_grad_()
    out = quantizer(latents)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    (out.vectors * upstream).sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, upstream)
    assert not list(quantizer.parameters())
    latents.grad = None
    quantizer(latents).losses["commitment"].backward()
    expected = 0.25 * 2 * (BATCH - START[0, [0, 0, 1]]) / BATCH.numel()
    torch.testing.assert_close(latents.grad, expected)


def test_codes_set_from_latents_lie_on_the_grid_in_order():
    quantizer = build_quantizer({"kind": "ksom", "dim": 2, "codes": 24, "grid": [6, 4]})
    assert isinstance(quantizer, KSOMQuantizer)
    places = torch.cartesian_prod(torch.arange(6.0), torch.arange(4.0) * 3)[torch.randperm(24)].unsqueeze(0)
    counts = places.sum(dim=-1)
    quantizer.set_codebook(places, counts)
    in_order = torch.cartesian_prod(torch.arange(4.0) * 3, torch.arange(6.0)).flip(1)
    assert torch.equal(quantizer.codebook()[0], in_order)
    # each count goes with its code
    assert torch.equal(quantizer.code_counts, quantizer.codebook().sum(dim=-1).clamp(min=1))
    sync = CodebookSync(quantizer)
    quantizer.eval()
    sync.step()
    assert torch.equal(quantizer.codebook().sort(dim=1).values, places.sort(dim=1).values)


def test_grid_helpers():
    quantizer = build_quantizer({"kind": "ksom", "dim": 2, "codes": 12, "grid": [4, 3]})
    assert isinstance(quantizer, KSOMQuantizer)
    assert quantizer.grid == (4, 3)
    first, second = torch.tensor([0, 0, 0, 0, 5, 3]), torch.tensor([1, 4, 5, 2, 5, 4])
    # code 3 ends a row, code 4 begins the next one
    assert quantizer.are_neighbours(first, second).tolist() == [True, True, True, False, True, False]
    assert quantizer.grid_distance()[0, 5] == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"grid": (3, 5)},
            r"grid=\[3, 5\] holds 15 codes, codes=64: use a grid that multiplies to 64, such as \[8, 8\]",
        ),
        ({"grid": (64, 0)}, r"grid=\[64, 0\] has a side below 1"),
        ({"decay": 1.0}, "decay"),
        ({"neighbourhood": "square"}, "'none', 'hard', 'gaussian' or 'exponential'"),
        ({"dim": 10, "groups": 3}, r"groups=3"),
        ({"grids": [8, 8]}, "grids"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        KSOMConfig(**{"codes": 64, **options})


def test_configurations_are_frozen_and_survive_json():
    config = KSOMConfig(codes=64, grid=(8, 8))
    assert KSOMConfig.model_validate(config.model_dump(mode="json")) == config
    with pytest.raises(ValidationError):
        config.codes = 32  # type: ignore[misc]
    assert all(field.description for name, field in EMAConfig.model_fields.items() if name != "kind")


def _train(steps: int, **options) -> tuple[float, float]:
    """Autoencoder of Gaussian classes: reconstruction error, and correlation of grid and code distances."""
    torch.manual_seed(0)
    centres = torch.randn(32, 16)
    data = centres[torch.randint(32, (8192,))] + 0.1 * torch.randn(8192, 16)
    sizes = [16, 64, 64, 8]
    encoder, decoder = (
        nn.Sequential(*[layer for i in range(3) for layer in (nn.Linear(s[i], s[i + 1]), nn.ReLU())][:-1])
        for s in (sizes, sizes[::-1])
    )
    quantizer = build_quantizer({"dim": 8, "codes": 64, "decay": 0.99, **options})
    sync = CodebookSync(quantizer)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    for _ in range(steps):
        batch = data[torch.randint(8192, (256,))]
        out = quantizer(encoder(batch))
        loss = (decoder(out.vectors) - batch).square().mean() + out.losses["commitment"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sync.step()
    with torch.no_grad():
        error = (decoder(quantizer.eval()(encoder(data)).vectors) - data).square().mean()
    grid = build_quantizer({"kind": "ksom", "dim": 8, "codes": 64})
    assert isinstance(grid, KSOMQuantizer)
    return float(error), grid_correlation(quantizer.codebook()[0], grid.grid_distance())


def test_collapse_and_its_cure():
    """The specification's table of section 1.8, in a fifth of its steps: EMA-VQ with count_init=0 and without updates
    of unused codes collapses, a neighbourhood keeps it alive and orders the map."""
    bad = {"count_init": 0, "update_empty": False}
    collapsed, disordered = _train(400, kind="ema", **bad)
    alive, ordered = _train(400, kind="ksom", **bad)
    assert collapsed > 0.9
    assert alive < 0.5 * collapsed
    assert ordered > 0.25 > abs(disordered)
