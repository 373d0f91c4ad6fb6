"""Pictures of image runs: something sensible to see, or a word why not, for every kind of quantizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import ShardedDataset
from pipeline.evaluation.history import History
from pipeline.evaluation.image_figures import image_pictures
from pipeline.evaluation.projection_figures import project
from pipeline.evaluation.run_view import RunView
from pipeline.models import build_model
from recipes.schema import load_recipe
from tests.conftest import IMAGE
from tests.evaluation.test_report import Reader

Opener = Callable[..., RunView]


@pytest.fixture(scope="module")
def open_untrained(image_dataset: Path) -> Opener:
    """A run of the tiny recipe as the report sees it, with weights as training begins."""

    def view(kind: str, *overrides: str) -> RunView:
        common = [each for each in IMAGE if kind == "ksom" or not each.startswith("quantizer.")]
        options = [f"data.path={image_dataset}", f"quantizer.kind={kind}", *common, *overrides]
        recipe = load_recipe("image/autoencoder_tiny_ksom", options)
        torch.manual_seed(0)
        model = build_model(recipe.model, recipe.quantizer).eval()
        dataset = ShardedDataset(image_dataset, "validation")
        return RunView(kind, Path(), "#3b7fc4", recipe, History([]), {}, None, model, dataset, "")

    return view


@pytest.mark.parametrize(
    ("kind", "overrides", "figures", "words"),
    [
        ("ksom", [], ["map of ksom", "U-matrix", "Latents and codes of ksom"], "at its place: neighbours look alike"),
        ("ste", ["quantizer.codes=24"], ["codes of ste", "Latents and codes of ste"], "24 codes decoded alone"),
        ("fsq", ["quantizer.levels=[4,4,3]", "quantizer.codes=48"], ["codes of fsq", "Latents and codes of fsq"], ""),
        (
            "gumbel",
            ["quantizer.codes=24", "quantizer.groups=1"],
            ["codes of gumbel", "Latents of gumbel"],
            "codes are chosen by learned scores",
        ),
        ("gumbel", ["quantizer.codes=24", "quantizer.groups=2"], ["Latents of gumbel"], "one of 2 groups or levels"),
        ("residual", ["quantizer.codes=24"], ["Latents and codes of residual"], "groups or levels stands for nothing"),
        ("identity", [], ["Latents of identity"], "there is no quantizer, and so there are no codes"),
        ("ste", ["quantizer.codes=5000"], ["Latents and codes of ste"], "5,000 codes are more than the 4,096"),
    ],
)
def test_every_kind_has_pictures_or_a_reason(
    open_untrained: Opener, kind: str, overrides: list[str], figures: list[str], words: str
) -> None:
    html = "".join(image_pictures([open_untrained(kind, *overrides)]))
    reader = Reader(html)
    assert reader.open == []
    assert reader.labels.count("original") == reader.labels.count(f"reconstruction by {kind}") == 12
    shown = [label for label in reader.labels if not label.startswith(("original", "reconstruction"))]
    assert [label for label in shown if not label.startswith("How often")] == figures
    assert words in "".join(reader.words)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in reader.addresses)
    assert len(html) < 600_000


def test_several_runs_stand_below_the_same_originals(open_untrained: Opener) -> None:
    reader = Reader("".join(image_pictures([open_untrained("ksom"), open_untrained("identity")])))
    assert reader.labels.count("original") == 12
    assert [label for label in reader.labels if re.match("Latents|map", label)] == [
        "map of ksom",
        "Latents and codes of ksom",
        "Latents of identity",
    ]


def test_the_plane_is_that_of_the_principal_directions(open_untrained: Opener) -> None:
    """Codes set to some of the latents fall on their dots, in their colours; neighbours on the grid are joined."""
    model = open_untrained("ksom").model
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pixels[:, :, :16] *= 0.2
    with torch.no_grad():
        model.reconstruct(pixels)
        seen: list[torch.Tensor] = []
        model.quantizer.register_forward_hook(lambda module, given, output: seen.append(given[0]))
        model.reconstruct(pixels)
        latents = seen[0].reshape(-1, seen[0].shape[-1])
        model.quantizer.code_vectors[0].copy_(latents[:12])
    found = project(model, pixels)
    assert found is not None
    assert np.allclose(found.codes, found.latents[:12], atol=1e-5)
    assert found.used.all()
    values = np.linalg.svd((latents - latents.mean(0)).numpy(), compute_uv=False) ** 2
    assert found.variance == pytest.approx(values[:2].sum() / values.sum(), rel=1e-4)
    assert found.latents.var(axis=0) == pytest.approx(values[:2] / len(latents), rel=1e-3)
    assert len(found.edges) == 4 * 2 + 3 * 3  # of a grid of 4 × 3
    assert sorted(map(tuple, found.edges[:9].tolist()))[0] == (0, 1)
    upper, lower = found.colours.reshape(2, 8, 8, 3)[:, :4], found.colours.reshape(2, 8, 8, 3)[:, 4:]
    assert upper.max() < 0.2 < lower.min()


def test_latents_without_extent_have_no_plane(open_untrained: Opener) -> None:
    model = open_untrained("ste", "quantizer.codes=8").model
    for parameter in model.encoder[-1].parameters():
        torch.nn.init.zeros_(parameter)
    assert project(model, torch.rand(2, 3, 32, 32)) is None
