"""`decode`: a set of image tokens as images again, one Ray task a shard.

In: a run and the tokens that `tokenize` made with it. Out: OUT/SPLIT/KEY.png or .jpg, what the model's decoder makes of
each image's codes, in 8 bits a channel.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.manifest import MANIFEST_NAME
from pipeline.data.storage import write_whole
from pipeline.export.shard_tasks import hash_of, load_for_shards, on_shards
from pipeline.training.run_folder import Run

SUFFIXES = {"png": "png", "jpeg": "jpg"}
JPEG_QUALITY = 95


@dataclass(frozen=True)
class DecodingSummary:
    """What was decoded."""

    out: Path
    images: int
    elapsed_seconds: float

    def __str__(self) -> str:
        return f"{self.images} images in {self.out}, {self.elapsed_seconds:.1f} s"


def decode(run: str | Path, tokens: str | Path, out: str | Path, form: str = "png") -> DecodingSummary:
    """Write the image of every sample of ``tokens`` to the new folder ``out``, as ``form`` "png" or "jpeg".

    Uses a running Ray or starts one. Raises FileNotFoundError where there is no finished set of tokens, ValueError for
    codes of speech, a run without a decoder and tokens that another model made, FileExistsError for an ``out`` that
    holds anything.
    """
    started = time.perf_counter()
    trained, tokens, out = Run(Path(run).resolve()), Path(tokens).resolve(), Path(out).resolve()
    model = trained.recipe().model
    if model.kind == "classifier" or getattr(model, "task", None) == "classification":
        raise ValueError(
            f"{trained.path} was trained to name classes, with model.kind={model.kind}, and has no decoder: only an "
            "autoencoder's codes become images again"
        )
    manifest = read_tokens_manifest(tokens)
    if manifest["kind"] != "image-codes":
        raise ValueError(f"{tokens} holds {manifest['kind'].replace('-', ' ')}: only codes of images can be decoded")
    checkpoint = _checkpoint_of(trained, manifest, tokens)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something already: give a new folder")
    tasks = [
        (split, shard["file"], shard["sha256"])
        for split, entry in manifest["splits"].items()
        for shard in entry["shards"]
    ]
    raw = manifest["weights"] == "trained"  # the decoder is to be the one beside the encoder that made the codes
    results = on_shards(_decode_shard, tasks, trained.path, checkpoint, tokens, out, form, raw)
    return DecodingSummary(out, sum(results.values()), time.perf_counter() - started)


def read_tokens_manifest(tokens: Path) -> dict[str, Any]:
    """What `tokenize` wrote last. Raises FileNotFoundError for a folder without it, ValueError for a data set."""
    file = tokens / MANIFEST_NAME
    if not file.is_file():
        raise FileNotFoundError(
            f"{tokens} is no finished set of tokens (no {MANIFEST_NAME}): give the folder that `tessera tokenize` made"
        )
    manifest = json.loads(file.read_text())
    if not str(manifest.get("kind")).endswith("-codes"):
        raise ValueError(f"{tokens} holds {manifest.get('kind')} data, not codes: make them with `tessera tokenize`")
    return manifest


def _checkpoint_of(run: Run, manifest: dict[str, Any], tokens: Path) -> Path:
    """The checkpoint that made the tokens, which need not be the newest."""
    checkpoint = run.checkpoints / manifest["checkpoint"]
    if checkpoint not in run.list_checkpoints():
        held = ", ".join(each.name for each in run.list_checkpoints()) or "none"
        raise ValueError(
            f"{tokens} was made by {manifest['checkpoint']} of {manifest['run']}, {run.path} holds {held}: "
            "give the run that made them, or tokenize again"
        )
    if hash_of(checkpoint) != manifest.get("model"):
        raise ValueError(
            f"{tokens} was made by another model than {checkpoint}: give the run that made them, or tokenize again"
        )
    return checkpoint


def _decode_shard(
    run: Path, checkpoint: Path, tokens: Path, out: Path, form: str, raw: bool, task: tuple[str, str, str]
) -> int:
    """One shard; returns its images. Runs in a Ray worker."""
    import torch
    from PIL import Image

    split, file, digest = task
    content = (tokens / file).read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{tokens / file} is not what its manifest says, it is damaged: tokenize again")
    model, recipe = load_for_shards(run, checkpoint, raw)
    images = 0
    for keys, codes in _batches(content, recipe.batch.samples or 1):
        grids = {level: torch.from_numpy(grid.astype(np.int64)) for level, grid in codes.items()}
        pixels = model.decode_codes(grids if len(grids) > 1 else next(iter(grids.values())))
        levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for key, image in zip(keys, levels, strict=True):
            picture = io.BytesIO()
            Image.fromarray(image).save(picture, form.upper(), quality=JPEG_QUALITY)
            target = out / split / f"{key}.{SUFFIXES[form]}"  # keys have the folders of the source
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, picture.getvalue())
        images += len(keys)
    return images


def _batches(content: bytes, size: int) -> Iterator[tuple[list[str], dict[str, np.ndarray]]]:
    """Keys, and by level codes ``(batch, height, width, groups)``, of up to ``size`` samples at a time."""
    keys: list[str] = []
    codes: dict[str, list[np.ndarray]] = {}
    for key, levels in _samples(content):
        keys.append(key)
        for level, grid in levels.items():
            codes.setdefault(level, []).append(grid)
        if len(keys) == size:
            yield keys, {level: np.stack(grids) for level, grids in codes.items()}
            keys, codes = [], {}
    if keys:
        yield keys, {level: np.stack(grids) for level, grids in codes.items()}


def _samples(content: bytes) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Key and codes of each sample; its members, KEY.npy or one KEY.LEVEL.npy a level, stand before its KEY.json."""
    levels: dict[str, np.ndarray] = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            sample, _, kind = name.partition(".")
            if kind.endswith("npy"):
                held = archive.extractfile(member)
                assert held is not None
                levels[kind.removesuffix("npy").removesuffix(".")] = np.load(io.BytesIO(held.read()))
            else:
                yield folder + slash + sample, levels
                levels = {}
