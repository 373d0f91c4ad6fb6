"""`tokenize`: a whole data set as shards of codes, one Ray task a shard.

In: a run and a prepared data set. Out: the same splits and shards with codes instead of samples, plain WebDataset:
KEY.npy, int16 or int32 ``(frames, groups)`` for speech and ``(height, width, groups)`` for images, and KEY.json; and
manifest.json with the hash of each shard, written last. A model with several levels of codes writes one array each,
KEY.LEVEL.npy. A vision transformer that names classes has a row of tokens, ``(1, 1 + patches, groups)``, the class
token first.

Speech: frame n begins n / ``frame_rate`` (Hz) seconds into the clip. Neighbouring frames with the same code in every
group are a run: KEY.json has the ``durations`` of a clip's runs, in frames, and their ``starts`` in seconds. With
``merge``, KEY.npy has a row a run instead of a row a frame; ``numpy.repeat(codes, durations, axis=0)`` undoes that.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.data import ShardedDataset, read_manifest
from pipeline.data.config import SAMPLE_RATE
from pipeline.data.manifest import MANIFEST_NAME
from pipeline.data.storage import as_place, write_whole
from pipeline.export.shard_tasks import hash_of, load_for_shards, on_shards
from pipeline.models.config import ONLY
from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    import numpy as np

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TokenSummary:
    """What a tokenisation made."""

    out: Path
    samples: int
    tokens: int
    shards: int
    bits_per_token: float
    elapsed_seconds: float

    def __str__(self) -> str:
        return (
            f"{self.samples} samples as {self.tokens:,} tokens of {self.bits_per_token:.0f} bits "
            f"in {self.shards} shards, {self.elapsed_seconds:.1f} s"
        )


def tokenize(
    run: str | Path, dataset: str | Path, out: str | Path, merge: bool = False, raw: bool = False
) -> TokenSummary:
    """Write the codes of every sample of ``dataset``, a folder or its URL, to the new folder ``out``; ``merge`` keeps
    one row of each run of equal speech frames. Of a run that has averaged its weights the average is used, unless
    ``raw``.

    A sample's codes depend on the model and the sample alone: not on shards, Ray's workers or the recipe's batches.
    Uses a running Ray or starts one. Raises ValueError when the run's model reads another kind of data or has no codes,
    and for ``merge`` of images; FileExistsError when ``out`` holds a finished set of tokens.
    """
    started = time.perf_counter()
    trained, source, out = Run(Path(run).resolve()), as_place(dataset), Path(out)
    if isinstance(source, Path):
        source = source.resolve()
    recipe, manifest = trained.recipe(), read_manifest(source)
    if manifest.kind != recipe.data_kind:
        raise ValueError(f"{source} holds {manifest.kind} data, {trained.path} was trained on {recipe.data_kind} data")
    if recipe.quantizer.kind == "identity":
        raise ValueError(
            f"{trained.path} has quantizer.kind=identity, which has no codes: train with another quantizer"
        )
    if merge and manifest.kind != "speech":
        raise ValueError(f"{source} holds {manifest.kind} data, which has no runs of frames: leave --merge out")
    if (out / MANIFEST_NAME).exists():
        raise FileExistsError(f"{out} holds a finished data set: give a new folder")
    checkpoint = trained.latest_checkpoint()
    if checkpoint is None:
        raise ValueError(f"{trained.path} holds no whole checkpoint: train first")
    tasks = [(split, shard) for split, entry in manifest.splits.items() for shard in range(len(entry.shards))]
    results = on_shards(_tokenize_shard, tasks, trained.path, checkpoint, source, out.resolve(), merge, raw)
    shapes = {level: shape for _, found in results.values() for level, shape in found.items()}
    entries = {task: entry for task, (entry, _) in results.items()}
    splits: dict[str, Any] = {split: {"shards": []} for split in manifest.splits}
    for split, shard in tasks:
        splits[split]["shards"].append(entries[split, shard])
    values = {
        "version": FORMAT_VERSION,
        "kind": f"{manifest.kind}-codes",
        "quantizer": recipe.quantizer.kind,
        "codes": recipe.quantizer.codes,
        "groups": recipe.quantizer.groups,
        **(_layout(recipe) if manifest.kind == "speech" else _grids(shapes)),
        **({"merged": merge} if manifest.kind == "speech" else {}),
        "run": recipe.name,
        "checkpoint": checkpoint.name,
        "model": hash_of(checkpoint),
        "weights": "averaged" if recipe.training.weight_ema and not raw else "trained",
        "source": manifest.fingerprint(),
        "splits": splits,
    }
    write_whole(out / MANIFEST_NAME, (json.dumps(values, indent=1) + "\n").encode())
    return TokenSummary(
        out=out,
        samples=sum(entry["samples"] for entry in entries.values()),
        tokens=sum(entry["tokens"] for entry in entries.values()),
        shards=len(results),
        bits_per_token=recipe.quantizer.groups * max(1, (recipe.quantizer.codes - 1).bit_length()),
        elapsed_seconds=time.perf_counter() - started,
    )


def _tokenize_shard(
    run: Path, checkpoint: Path, source: Path | str, out: Path, merge: bool, raw: bool, task: tuple[str, int]
) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """One shard of codes; returns its manifest entry, and the shape of a sample's codes by level. Runs in a Ray
    worker."""
    import numpy as np

    split, shard = task
    dataset = ShardedDataset(source, split)
    entries = dataset.manifest.splits[split].shards
    first = sum(entry.samples for entry in entries[:shard])
    buffer, tokens = io.BytesIO(), 0
    shapes: dict[str, list[int]] = {}
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        model, recipe = load_for_shards(run, checkpoint, raw)
        indexes = range(first, first + entries[shard].samples)
        for key, levels, facts in _codes_of(model, recipe, dataset, indexes):
            if dataset.kind == "speech":
                codes = levels[ONLY]
                durations, starts = runs_of(codes)
                facts |= {"durations": durations.tolist(), "starts": (starts / facts["frame_rate"]).tolist()}
                levels = {ONLY: codes[starts] if merge else codes}
            shapes = {level: list(codes.shape) for level, codes in levels.items()}
            number = sum(math.prod(shape[:-1]) for shape in shapes.values())
            facts = {"tokens": number, "shape": shapes.get(ONLY, shapes)} | facts
            for level, codes in levels.items():
                content = io.BytesIO()
                np.save(content, codes)
                _add(archive, f"{key}.{level}.npy" if level else f"{key}.npy", content.getvalue())
            _add(archive, f"{key}.json", json.dumps(facts).encode())
            tokens += facts["tokens"]
    file = out / entries[shard].file
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, buffer.getvalue())
    entry = {
        "file": entries[shard].file,
        "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "bytes": len(buffer.getvalue()),
        "samples": entries[shard].samples,
        "tokens": tokens,
    }
    return entry, shapes


def runs_of(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of frames with the same code in every group: codes ``(frames, groups)`` → durations and starts in frames,
    both int64 ``(runs,)``.
    """
    import numpy as np

    changes = (codes[1:] != codes[:-1]).any(axis=1)
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, len(codes)), dtype=bool), changes]))
    return np.diff(starts, append=len(codes)), starts


def _codes_of(
    model: Any, recipe: Any, dataset: ShardedDataset, indexes: range
) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    """Key, codes by level and facts of each sample, whole and unaugmented."""
    import numpy as np

    width = np.int16 if recipe.quantizer.codes <= 2**15 else np.int32
    found = _image_codes if dataset.kind == "image" else _speech_codes
    for key, levels, facts in found(model, recipe, dataset, indexes):
        yield key, {level: codes.numpy().astype(width) for level, codes in levels.items()}, facts


def _image_codes(
    model: Any, recipe: Any, dataset: ShardedDataset, indexes: range
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    from pipeline.data import ImageCollation, SampleReference

    collation = ImageCollation(recipe.data, recipe.seed, augment=False)
    size = recipe.batch.samples or 1
    for first in range(indexes.start, indexes.stop, size):
        references = [SampleReference(index, 0) for index in range(first, min(first + size, indexes.stop))]
        batch = collation(references, dataset, 0, 0)
        codes, _ = model.encode_codes(batch)
        for row, key in enumerate(batch.keys):
            levels = codes if isinstance(codes, dict) else {ONLY: codes}
            yield key, {level: of_batch[row] for level, of_batch in levels.items()}, {}


def _speech_codes(
    model: Any, recipe: Any, dataset: ShardedDataset, indexes: range
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Clips come alone: a group norm over padding would make a clip's codes depend on its neighbours."""
    from pipeline.data import SampleReference
    from pipeline.export.clip_codes import clip_codes
    from pipeline.models import build_collation

    collation: Any = build_collation(recipe)
    for index in indexes:
        member = dataset.read(index)
        waveforms, lengths = collation.clips([SampleReference(index, 0)], [member])
        codes = clip_codes(model, waveforms[0])
        facts = {"seconds": lengths[0] / SAMPLE_RATE, "frames": len(codes)} | _layout(recipe)
        yield member.key, {ONLY: codes}, facts


def _layout(recipe: Any) -> dict[str, Any]:
    """How tokens lie in a clip: the ``frame_rate`` in Hz."""
    return {"frame_rate": SAMPLE_RATE / math.prod(stride for _, _, stride in recipe.model.conv_layers)}


def _grids(shapes: dict[str, list[int]]) -> dict[str, Any]:
    """How tokens lie in an image: the ``latent_grid`` [height, width], of several levels by level."""
    grids = {level: shape[:-1] for level, shape in shapes.items()}
    return {"latent_grid": grids.get(ONLY, grids)} if grids else {}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # owner 0, time 0: equal codes are equal bytes
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
