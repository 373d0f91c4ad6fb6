"""`export`: a run's weights in a format that others load.

In: a run folder and a format. Out: a folder, written beside, fsynced and renamed (design rule 7).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pipeline.data.storage import fsync_folder
from pipeline.training.run_folder import Run

if TYPE_CHECKING:
    from pipeline.quantizers import Quantizer
    from recipes.schema import Recipe

CODEBOOK_FILE = "codebook.safetensors"
"""Of several levels each has one: ``codebook.LEVEL.safetensors``."""


def export(run: str | Path, out: str | Path, format: str | None = None, raw: bool = False) -> Path:
    """Write the weights of ``run``'s latest checkpoint to the new folder ``out`` and return it.

    huggingface: a ``Wav2Vec2Model`` folder for transformers, with a ``gumbel`` quantizer a ``Wav2Vec2ForPreTraining``;
    fairseq2: ``model.pt`` and the asset card ``model.yaml``; safetensors: the whole state dict under our names;
    None: huggingface for speech, safetensors for images. Each with ``codebook.safetensors``, which
    :func:`load_quantizer` reads, and the recipe. Of a run that averages its weights these are the average, unless
    ``raw``.

    Raises ValueError for an unknown format, for a format that does not know the model, and FileExistsError when ``out``
    holds something. After an error ``out`` is as it was.
    """
    out = Path(out)
    writers = {"huggingface": _huggingface, "fairseq2": _fairseq2, "safetensors": _safetensors}
    if format is not None and format not in writers:
        raise ValueError(f"format={format!r}: use {', '.join(writers)}")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} holds files already: give a new folder")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: give a new folder")
    model, recipe = Run(run).load_model(raw=raw)
    format = format or ("huggingface" if recipe.data_kind == "speech" else "safetensors")
    if format != "safetensors" and recipe.data_kind != "speech":
        raise ValueError(f"format={format} has no model like {recipe.model.kind}: use safetensors")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.partial-{uuid4().hex}")
    beside.mkdir()
    try:
        writers[format](model, recipe, beside)
        write_codebook(model, recipe, beside)
        (beside / "recipe.yaml").write_text(recipe.to_yaml())
        readers = (beside / "recipe.yaml").stat().st_mode & 0o777
        for file in beside.iterdir():
            file.chmod(readers)  # safetensors writes files that only their owner may read
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        fsync_folder(beside)
        beside.rename(out)  # an empty folder gives way, one that was filled meanwhile does not
        fsync_folder(out.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return out


def write_codebook(model: Any, recipe: Recipe, folder: Path) -> None:
    """``codebook.safetensors``, of several levels each its own: the effective ``codes (groups, codes, dim // groups)``
    fp32 for readers who only look codes up, and the quantizer's state as ``quantizer.NAME``; nothing for a model
    without codes."""
    from safetensors.torch import save_file

    from pipeline.models.base import quantizers_of

    for level, quantizer in quantizers_of(model).items():
        if not quantizer.codes:
            continue
        tensors = {"codes": quantizer.codebook().contiguous().clone()}
        tensors |= {f"quantizer.{name}": tensor.contiguous().clone() for name, tensor in quantizer.state_dict().items()}
        settings = {"quantizer": json.dumps(quantizer.config.model_dump(mode="json")), "recipe": recipe.name}
        save_file(tensors, _codebook_file(folder, level), metadata=settings)


def _codebook_file(folder: Path, level: str) -> Path:
    file = folder / CODEBOOK_FILE
    return file.with_suffix(f".{level}{file.suffix}") if level else file


def load_quantizer(folder: str | Path, level: str = "") -> Quantizer:
    """The quantizer that :func:`export` wrote to ``folder``, in evaluation mode; ``level`` is one of a model's with
    several.

    Raises FileNotFoundError when there is none, ValueError for a file of another layout.
    """
    from safetensors import safe_open

    from pipeline.quantizers import build_quantizer

    file = _codebook_file(Path(folder), level)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: give a folder that `tessera export` wrote")
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata() or {}
        names = [name for name in stored.keys() if name.startswith("quantizer.")]  # noqa: SIM118 (no mapping)
        if "quantizer" not in metadata or not names:
            raise ValueError(f"{file} names no quantizer: give a folder that `tessera export` wrote")
        state = {name.removeprefix("quantizer."): stored.get_tensor(name) for name in names}
    quantizer = build_quantizer(json.loads(metadata["quantizer"]))
    quantizer.load_state_dict(state)
    return quantizer.eval()


def _huggingface(model: Any, recipe: Recipe, folder: Path) -> None:
    from pipeline.export.huggingface import write_huggingface

    write_huggingface(model, recipe, folder)


def _fairseq2(model: Any, recipe: Recipe, folder: Path) -> None:
    from pipeline.export.fairseq2 import write_fairseq2

    write_fairseq2(model, recipe, folder)


def _safetensors(model: Any, recipe: Recipe, folder: Path) -> None:
    from safetensors.torch import save_file

    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"recipe": recipe.name})
