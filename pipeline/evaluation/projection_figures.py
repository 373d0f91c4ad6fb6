"""Latents and codes on a plane: the two directions in which latents vary most, latents as dots in the colour of what
they stand for, codes on top.

In: a run with its model and data. Out: HTML, or nothing where latents have less than two dimensions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from pipeline.codebooks.topology import on_grid
from pipeline.data import SampleReference
from pipeline.evaluation import page
from pipeline.evaluation.figures import projection_chart
from pipeline.evaluation.metrics import plain_collation
from pipeline.evaluation.run_view import RunView, spread
from pipeline.models.base import quantizers_of
from pipeline.models.config import ONLY

IMAGES = 24
POINTS = 1500
DRAWN_CODES = 1024


class Projection(NamedTuple):
    """What lies where on the plane, in numbers of the plane's own scale."""

    latents: np.ndarray  # (points, 2)
    colours: np.ndarray  # (points, 3) in [0, 1], of what lies under each latent
    codes: np.ndarray  # (codes, 2)
    used: np.ndarray  # (codes,) bool, by these images
    edges: np.ndarray  # (edges, 2) int: codes that are neighbours along an axis of the grid
    variance: float  # share of the latents' variance that the plane shows


def projection_picture(run: RunView, level: str = ONLY) -> str:
    """A figure of a level of ``run`` and what it shows."""
    collation = plain_collation(run.recipe)
    references = [SampleReference(index, 0) for index in spread(len(run.dataset), IMAGES)]
    projection = project(run.model, collation(references, run.dataset, 0, 0).pixels, level)
    if projection is None:
        return ""
    quantizer: Any = quantizers_of(run.model)[level]
    name = f"{run.name}, {level}" if level else run.name
    shown = f"{len(projection.latents)} latents of {len(references)} images, in the mean colour of their patches"
    held = f"the two directions hold {projection.variance:.0%} of their variance"
    if not quantizer.codes:
        codes = "there are no codes."
    elif not quantizer.compares_latents:
        codes = "codes are chosen by learned scores and need not lie where the latents do: they are left out."
    elif quantizer.groups > 1:
        codes = f"circles: what combinations of the codes of {quantizer.groups} groups make of these latents."
    else:
        codes = "circles: codes, hollow where these images use none; those far from all latents lie outside."
    title = f"Latents and codes of {name}" if len(projection.codes) else f"Latents of {name}"
    chart = projection_chart(title, projection)
    return page.figure(chart, f"{shown}; {held}; {codes}", "wide")


@torch.inference_mode()
def project(model: Any, pixels: Tensor, level: str = ONLY) -> Projection | None:
    """The latents of ``pixels (batch, 3, height, width)`` on their principal plane, as codes are compared with them;
    None for latents that are no two-dimensional cloud.
    """
    quantizer: Any = quantizers_of(model)[level]
    latents, output = _watch(quantizer, lambda: model.reconstruct(pixels))
    if latents.dim() != 4:
        return None
    under = adaptive_avg_pool2d(pixels, (latents.shape[1], latents.shape[2])).permute(0, 2, 3, 1).reshape(-1, 3)
    chosen = output.codes.reshape(-1, output.codes.shape[-1])
    cloud = quantizer.real_latents(latents, None) if quantizer.compares_latents else latents.flatten(0, -2)
    kept = torch.tensor(spread(len(cloud), POINTS))
    cloud, under, chosen = cloud[kept].double(), under[kept], chosen[kept]
    centre = cloud.mean(dim=0)
    variances, axes = torch.linalg.eigh((cloud - centre).T @ (cloud - centre) / len(cloud))
    if len(variances) < 2 or variances[-2] <= 1e-12 * cloud.square().mean():
        return None
    plane = axes[:, [-1, -2]]
    plane = (
        plane * plane.gather(0, plane.abs().argmax(dim=0, keepdim=True)).sign()
    )  # eigenvectors have no sign of theirs
    codes, used, edges = _codes(quantizer, chosen)
    return Projection(
        ((cloud - centre) @ plane).numpy(),
        under.numpy(),
        ((codes.double() - centre) @ plane).numpy() if len(codes) else np.zeros((0, 2)),
        used.numpy(),
        edges.numpy(),
        float(variances[-2:].sum() / variances.clamp(min=0).sum()),
    )


def _codes(quantizer: Any, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes to draw ``(codes, dim)``, which of them ``chosen (tokens, groups)`` holds, and the edges of their grid."""
    none = torch.zeros(0, 2, dtype=torch.int64)
    if not quantizer.codes or not quantizer.compares_latents:
        return torch.zeros(0, 2), torch.zeros(0, dtype=torch.bool), none
    if quantizer.groups > 1:
        combined = chosen.unique(dim=0)[:DRAWN_CODES]
        of_groups = quantizer.vectors_of(combined.clamp(min=0)) * (combined >= 0).unsqueeze(-1)
        return quantizer.join_groups(of_groups), torch.ones(len(combined), dtype=torch.bool), none
    used = chosen[:, 0].bincount(minlength=quantizer.codes) > 0
    if quantizer.codes > DRAWN_CODES:  # the used ones tell most
        return quantizer.codebook()[0][used][:DRAWN_CODES], used[used][:DRAWN_CODES], none
    edges = [none]
    if hasattr(quantizer, "grid"):
        places = on_grid(torch.arange(quantizer.codes), list(quantizer.grid))
        for axis, length in enumerate(places.shape):
            before, after = places.narrow(axis, 0, length - 1), places.narrow(axis, 1, length - 1)
            edges.append(torch.stack([before.flatten(), after.flatten()], dim=1))
    return quantizer.codebook()[0], used, torch.cat(edges)


def _watch(quantizer: nn.Module, action: Any) -> tuple[Tensor, Any]:
    """What went into ``quantizer`` and what came out while ``action`` ran."""
    seen: list[tuple[Tensor, Any]] = []
    handle = quantizer.register_forward_hook(lambda module, given, output: seen.append((given[0], output)))
    try:
        action()
    finally:
        handle.remove()
    return seen[0]
