"""The map of ViT-SOM: the specification's golden vectors (2.6), gradients, schedules, topologies."""

import math

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer
from pipeline.quantizers.som import map_coordinates, map_distances, map_loss, neighbour_shares, temperature_at

PROTOTYPES = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]
LATENTS = [[2.0, 0.0], [0.5, 1.0]]
STEPS = 1000


def golden(**options):
    """The 2 × 2 map of the specification; T = 2 and γ = 1 at inference."""
    config = {"kind": "som", "dim": 2, "codes": 4, "grid": [2, 2], "temperature": [2, 2], "weight": 1, "steps": STEPS}
    quantizer = build_quantizer({**config, **options}).eval()
    with torch.no_grad():
        quantizer.prototypes.weight.copy_(torch.tensor([PROTOTYPES]))
    return quantizer


def test_golden_distances_and_shares():
    quantizer = golden()
    distances = quantizer.distances(torch.tensor(LATENTS))
    expected = torch.tensor([[0, 1, 0.292893, 2], [0.552786, 0.105573, 0.051317, 1.447214]])
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-6)
    codes = distances.argmin(dim=1)
    assert codes.tolist() == [0, 2]
    shares = neighbour_shares(codes, quantizer.coordinates, 2.0)
    expected = torch.tensor([[1, 0.882497, 0.882497, 0.778801], [0.882497, 0.778801, 1, 0.882497]])
    torch.testing.assert_close(shares, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("reduction", "loss", "factor"), [("mean", 0.574638, 1), ("sum_over_prototypes", 2.298553, 4)])
def test_golden_loss_and_gradients(reduction, loss, factor):
    quantizer = golden(reduction=reduction)
    latents = torch.tensor(LATENTS, requires_grad=True)
    output = quantizer(latents)
    assert output.codes.tolist() == [[0], [2]]
    assert torch.equal(output.vectors, latents)
    assert output.losses["som"].item() == pytest.approx(loss, abs=2e-6)
    output.losses["som"].backward()
    of_latents = torch.tensor([[0, -0.094157], [0.003206, -0.001603]])
    of_prototypes = torch.tensor([[0, -0.098666], [-0.153848, 0], [-0.019237, 0.019237], [0, -0.098666]])
    torch.testing.assert_close(latents.grad, factor * of_latents, rtol=0, atol=factor * 1e-6)
    torch.testing.assert_close(quantizer.prototypes.weight.grad[0], factor * of_prototypes, rtol=0, atol=factor * 1e-6)


def test_golden_loss_of_a_narrow_neighbourhood():
    output = golden(temperature=[0.1, 0.1])(torch.tensor(LATENTS))
    assert output.losses["som"].item() == pytest.approx(0.006415, abs=1e-6)


def test_golden_temperatures():
    steps = 70000 / 128 * 500
    for step, expected in [(0, 20), (steps / 2, 0.141419), (steps - 1, 0.001), (2 * steps, 0.001)]:
        assert float(temperature_at(step, steps, 20, 0.001)) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum_over_prototypes"])
@pytest.mark.parametrize("distance", ["cosine", "euclidean", "manhattan"])
def test_gradients_are_those_of_finite_differences(distance, reduction):
    generator = torch.Generator().manual_seed(0)
    latents, prototypes = (
        torch.randn(rows, 5, generator=generator, dtype=torch.float64, requires_grad=True) for rows in (3, 6)
    )
    coordinates = map_coordinates((3, 2), "hexagonal").double()

    def loss(latents, prototypes):
        distances = map_distances(latents, prototypes, distance)
        return map_loss(distances, neighbour_shares(distances.argmin(dim=1), coordinates, 0.8), reduction)

    assert torch.autograd.gradcheck(loss, (latents, prototypes))


@pytest.mark.parametrize(("distance", "expected"), [("euclidean", [1.0, math.sqrt(5)]), ("manhattan", [1.0, 3.0])])
def test_other_distances_are_not_squared(distance, expected):
    found = golden(distance=distance).distances(torch.tensor([[2.0, 0.0]]))
    assert found[0, :2].tolist() == pytest.approx([expected[0], expected[1]])


def test_the_schedules_count_optimiser_steps_not_forwards():
    quantizer = golden(temperature=[4, 0.25], weight=0.5, steps=5).train()
    sync = CodebookSync(quantizer)
    seen = []
    for _ in range(7):
        for _ in range(3):  # micro-batches
            metrics = quantizer(torch.tensor(LATENTS)).metrics
        seen.append((float(metrics["temperature"]), float(metrics["weight"])))
        sync.step()
    assert [temperature for temperature, _ in seen] == pytest.approx([4, 2, 1, 0.5, 0.25, 0.25, 0.25])
    assert [weight for _, weight in seen] == pytest.approx([0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert float(quantizer.eval()(torch.tensor(LATENTS)).metrics["weight"]) == 0.5
    assert float(golden(weight=0.5)(torch.tensor(LATENTS)).metrics["weight"]) == 0.5, "in full at inference, at once"


def test_a_resumed_map_goes_on_with_its_schedules():
    first, second = golden(steps=9, temperature=[4, 1]).train(), golden(steps=9, temperature=[4, 1]).train()
    sync = CodebookSync(first)
    for _ in range(3):
        first(torch.tensor(LATENTS))
        sync.step()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.temperature(), first.temperature())
    assert torch.equal(second.weight(), first.weight())


def test_prototypes_start_in_the_positive_corner():
    torch.manual_seed(0)
    cosine = build_quantizer({"kind": "som", "dim": 30, "codes": 9, "steps": 4}).prototypes.weight
    assert float(cosine.detach().min()) >= 0
    torch.testing.assert_close(cosine.norm(dim=-1), torch.ones(1, 9))
    plain = build_quantizer({"kind": "som", "dim": 30, "codes": 9, "steps": 4, "distance": "manhattan"})
    assert 0.9 < float(plain.prototypes.weight.detach().max()) < 1


def test_codes_of_the_cosine_distance_have_length_1_whatever_became_of_them():
    quantizer = golden()
    torch.testing.assert_close(quantizer.codebook().norm(dim=-1), torch.ones(1, 4))
    assert quantizer.codebook()[0, 2].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])
    assert golden(distance="euclidean").codebook()[0].tolist() == PROTOTYPES


def test_hexagonal_places_have_six_neighbours():
    quantizer = build_quantizer(
        {"kind": "som", "dim": 2, "codes": 20, "grid": [5, 4], "steps": 4, "topology": "hexagonal"}
    )
    half = math.sqrt(3) / 2
    expected = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0], [4, 0], [0.5, half]])
    torch.testing.assert_close(quantizer.coordinates[:6], expected)
    everyone = torch.arange(20)
    beside = [int(quantizer.are_neighbours(torch.full((20,), code), everyone).sum()) - 1 for code in (0, 7, 12, 5, 19)]
    assert beside == [2, 6, 6, 5, 2]
    distances = quantizer.grid_distance()
    torch.testing.assert_close(distances[7, [6, 8, 2, 3, 12, 13]], torch.ones(6))


def test_square_places_have_eight():
    quantizer = build_quantizer({"kind": "som", "dim": 2, "codes": 20, "grid": [5, 4], "steps": 4})
    everyone = torch.arange(20)
    assert int(quantizer.are_neighbours(torch.full((20,), 7), everyone).sum()) - 1 == 8
    assert float(quantizer.grid_distance()[0, 6]) == pytest.approx(math.sqrt(2))


def test_metrics_tell_distance_and_topographic_error():
    """The first latent lies next to prototypes 0 and 2, the second to 2 and 1: on a line the first pair is apart."""
    latents = torch.tensor(LATENTS)
    line = golden(grid=[4, 1])(latents).metrics
    assert float(line["topographic_error"]) == 0.5
    assert float(line["distance"]) == pytest.approx(0.051317 / 2, abs=1e-6)
    assert float(golden()(latents).metrics["topographic_error"]) == 0.0


def test_it_unfolds_on_a_square():
    """Trained alone on points spread over a square, neighbours on the grid are neighbours in space."""
    from pipeline.codebooks.topology import grid_correlation

    torch.manual_seed(0)
    quantizer = build_quantizer(
        {
            "kind": "som",
            "dim": 2,
            "codes": 25,
            "distance": "euclidean",
            "temperature": [2.5, 0.1],
            "weight": 1.0,
            "steps": 300,
            "reduction": "sum_over_prototypes",
        }
    ).train()
    sync = CodebookSync(quantizer)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        quantizer(torch.rand(64, 2)).losses["som"].backward()
        optimizer.step()
        sync.step()
    assert (
        grid_correlation(quantizer.codebook()[0], quantizer.grid_distance()) > 0.8
    )  # 0 where neighbours learn nothing
    assert float(quantizer.eval()(torch.rand(1000, 2)).metrics["distance"]) < 0.13  # one code in the middle has .38


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, "groups=2: latents are compared whole"),
        ({"temperature": [1, 2]}, r"temperature=\[1, 2\] must fall and stay above 0"),
        ({"temperature": [1, 0]}, r"temperature=\[1, 0\] must fall"),
        ({"topology": "hexagonal", "grid": [4, 2, 2]}, r"grid=\[4, 2, 2\] has no hexagonal topology"),
        ({"grid": [3, 2]}, r"grid=\[3, 2\] holds 6 codes, codes=16"),
        ({"steps": None}, "quantizer.steps is missing: give the optimiser steps"),
        ({"distance": "l3"}, "quantizer.distance='l3'"),
    ],
)
def test_what_can_not_be_a_map_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_quantizer({"kind": "som", "dim": 4, "codes": 16, "steps": 10, **options})
