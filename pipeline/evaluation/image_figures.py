"""The pictures of image runs: originals beside reconstructions, the codebook as a grid of pictures, the map's borders.

In: runs with their models and the split they are measured on. Out: HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.codebooks.topology import on_grid, u_matrix
from pipeline.data import SampleReference
from pipeline.evaluation import page
from pipeline.evaluation.figures import heat_map
from pipeline.evaluation.metrics import plain_collation
from pipeline.evaluation.projection_figures import projection_picture
from pipeline.evaluation.run_view import RunView, spread
from pipeline.models.base import quantizers_of
from pipeline.models.config import ONLY

SHOWN = 12
LARGEST_SIDE = 192
DRAWN_CODES = 4096
FIELD = 6
"""Latents to a side of the plane of one code that is decoded for its tile: enough that the border is not seen."""
SMALLEST_TILE = 8


def image_pictures(runs: Sequence[RunView]) -> list[str]:
    """Everything there is to see of these image runs."""
    shown = [run for run in runs if run.model is not None and run.dataset is not None]
    parts = []
    decoding = [run for run in shown if getattr(run.model, "decoder", None) is not None]
    if decoding:
        parts += [page.heading("Originals and reconstructions", 3), reconstructions(decoding)]
    for run in shown:
        if run not in decoding or run.recipe.model.kind == "vit_som":  # a code of its map is a whole image
            continue
        for place, level in enumerate(quantizers_of(run.model)):
            parts += codebook_pictures(run, level, place)
            parts.append(projection_picture(run, level))
    return parts


@torch.inference_mode()
def reconstructions(runs: Sequence[RunView]) -> str:
    """The same images of the split every time: the original, and below it what each run makes of it."""
    rows: list[list[str]] = []
    for run in runs:
        references = [SampleReference(index, 0) for index in spread(len(run.dataset), SHOWN)]
        originals = plain_collation(run.recipe)(references, run.dataset, 0, 0).pixels
        reconstruction, _ = run.model.reconstruct(originals)
        if not rows:
            rows.append([page.image(to_pixels(picture), "original") for picture in originals])
        rows.append([page.image(to_pixels(picture), f"reconstruction by {run.name}") for picture in reconstruction])
    legend = "Top: original. Below: " + ", then ".join(run.name for run in runs) + "."
    where = f"{len(rows[0])} images spread over the {runs[0].dataset.split} split."
    return page.paragraph(f"{legend} {where}") + page.stacks(zip(*rows, strict=True))


@torch.inference_mode()
def codebook_pictures(run: RunView, level: str = ONLY, place: int = 0) -> list[str]:
    """Each code decoded as a tile, at its place on the grid or by how often it occurs; for grids the U-matrix too.

    ``place`` is the level's among several.
    """
    quantizer: Any = quantizers_of(run.model)[level]
    name = f"{run.name}, {level}" if level else run.name
    why = _not_drawn(quantizer)
    if why:
        return [page.heading(f"Codebook of {name}", 3), page.paragraph(f"Not drawn code by code: {why}.")]
    counts = torch.tensor(run.metrics["code_counts"][place]) if run.metrics else torch.zeros(quantizer.codes)
    tiles = draw_codes(run.model, level)
    if not hasattr(quantizer, "grid"):
        columns = max(8, round(quantizer.codes**0.5 * 1.4))
        order = counts.argsort(descending=True, stable=True)
        caption = f"Each of the {quantizer.codes} codes decoded alone, the most frequent first."
        picture = page.image(mosaic(tiles[order], columns), f"codes of {name}", "pixels")
        return [page.heading(f"Codebook of {name}", 3), page.figure(picture, caption)]
    grid = list(quantizer.grid)
    rows = flat_grid(on_grid(torch.arange(quantizer.codes), grid))
    shape = " × ".join(map(str, grid))
    picture = page.image(mosaic(tiles[rows.flatten()], rows.shape[1]), f"map of {name}", "pixels")
    borders = u_matrix(quantizer.codebook()[0], grid, quantizer.are_neighbours)
    return [
        page.heading(f"Map of {name}", 3),
        page.cards(
            [
                page.figure(
                    picture, f"Each code of the {shape} grid decoded alone, at its place: neighbours look alike."
                ),
                page.figure(
                    heat_map("U-matrix", flat_grid(borders), "distance to the neighbours"),
                    "High values are borders between regions of like codes.",
                ),
                page.figure(
                    heat_map(
                        "How often each code occurs", flat_grid(on_grid(counts, grid)), "tokens", "viridis", log=True
                    ),
                    "Over the whole split; codes that never occur are left empty.",
                ),
            ]
        ),
    ]


def _not_drawn(quantizer: Any) -> str:
    """Why the codes of a quantizer can't be looked at one by one; empty where they can."""
    if not quantizer.codes:
        return "there is no quantizer, and so there are no codes"
    if quantizer.groups > 1:
        return f"a code of one of {quantizer.groups} groups or levels stands for nothing without those of the others"
    if quantizer.codes > DRAWN_CODES:
        return f"{quantizer.codes:,} codes are more than the {DRAWN_CODES:,} that a page has room for"
    return "there is one code" if quantizer.codes == 1 else ""


def draw_codes(model: Any, level: str = ONLY, chunk: int = 128) -> Tensor:
    """Each code alone, as the decoder shows it: ``(codes, 3, side, side)`` in [0, 1].

    A plane of one code is decoded, with nothing from other levels, and its middle is cut out, one latent's pixels wide
    and at least :data:`SMALLEST_TILE`.
    """
    tiles = []
    levels = list(quantizers_of(model))
    for codes in torch.arange(quantizers_of(model)[level].codes).split(chunk):
        planes = {}
        for place, name in enumerate(levels):
            side = FIELD << place  # a level has twice the latents to a side of the one before it
            shown = codes if name == level else torch.full_like(codes, -1)
            planes[name] = shown[:, None, None, None].expand(-1, side, side, 1).contiguous()
        plane = model.decode_codes(planes if len(levels) > 1 else planes[level])
        side = min(max(plane.shape[-1] // (FIELD << levels.index(level)), SMALLEST_TILE), plane.shape[-1])
        first = (plane.shape[-1] - side) // 2
        tiles.append(plane[:, :, first : first + side, first : first + side].clamp(0, 1).cpu())
    return torch.cat(tiles)


def flat_grid(values: Tensor) -> Tensor:
    """A grid of any number of axes as rows and columns: a line is broken into rows, further axes lie side by side."""
    if values.dim() == 1:
        columns = max((width for width in range(1, 33) if len(values) % width == 0), default=len(values))
        return values.reshape(-1, columns if columns > 1 else len(values))
    return values.reshape(values.shape[0], -1)


def mosaic(tiles: Tensor, columns: int) -> Tensor:
    """Tiles ``(number, 3, side, side)`` in rows, one pixel apart: uint8 ``(height, width, 3)``."""
    number, _, side, _ = tiles.shape
    rows = -(-number // columns)
    canvas = torch.full((rows * (side + 1) - 1, columns * (side + 1) - 1, 3), 128, dtype=torch.uint8)
    for place, tile in enumerate(tiles):
        top, left = place // columns * (side + 1), place % columns * (side + 1)
        canvas[top : top + side, left : left + side] = to_pixels(tile)
    return canvas


def to_pixels(picture: Tensor) -> Tensor:
    """``(3, height, width)`` in [0, 1] → uint8 ``(height, width, 3)``, made smaller when larger than a report needs."""
    side = max(picture.shape[-2:])
    if side > LARGEST_SIDE:
        scale = LARGEST_SIDE / side
        picture = torch.nn.functional.interpolate(picture[None].float(), scale_factor=scale, mode="area")[0]
    return (picture.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu()
