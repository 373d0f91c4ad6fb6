"""Reads published checkpoints of wav2vec 2.0: files of fairseq and fairseq2, folders of Hugging Face, our own exports.

In: a path. Out: tensors by name, and the settings that came with them. Nothing in a file is executed: pickles pass
through torch's ``weights_only`` reader, in which the classes that fairseq stores its configuration by are stand-ins
that keep attributes and do nothing.
"""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "model.pt")


class WeightsError(ValueError):
    """Weights that can't be read, or are another model's; the message says why, without the file's name."""


@dataclass(frozen=True)
class Published:
    """What a checkpoint holds."""

    state: dict[str, Tensor]
    """Its tensors under its own names."""
    model: dict[str, Any] = field(default_factory=dict)
    """Its configuration of the model, flat, by the names of its toolkit; empty where there is none."""
    normalise: bool | None = None
    """Whether its clips were brought to zero mean and unit variance; None where it does not say."""


def read_published(path: str | Path) -> Published:
    """Read a file, or a folder that holds one of the files that Hugging Face or `tessera export` writes.

    Raises :class:`WeightsError` for a missing path, a file of another format, and a pickle of more than tensors and
    settings.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    file = next((path / name for name in _FOLDER_FILES if (path / name).is_file()), None)
    if file is None:
        raise WeightsError(f"the folder holds none of {', '.join(_FOLDER_FILES)}: name a checkpoint's file")
    if file.suffix == ".json":
        parts = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        state = {name: tensor for part in parts for name, tensor in _read_file(path / part).state.items()}
    else:
        state = _read_file(file).state
    config, processor = path / "config.json", path / "preprocessor_config.json"
    return Published(
        state,
        json.loads(config.read_text()) if config.is_file() else {},
        json.loads(processor.read_text()).get("do_normalize") if processor.is_file() else None,
    )


def _read_file(path: Path) -> Published:
    if not path.is_file():
        raise WeightsError("there is no such file or folder")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return Published(load_file(path))
        except SafetensorError as error:
            raise WeightsError(f"not readable as safetensors ({error})") from error
    content = _unpickle(path)
    holder = content.get("model", content)
    state = {name: tensor for name, tensor in holder.items() if isinstance(tensor, Tensor)}
    if not state:
        raise WeightsError(f"holds no tensors under {'model' if 'model' in content else 'its top level'}")
    settings = _plain(content.get("cfg") or content.get("args") or {})
    # New checkpoints of fairseq have a section for each part, old ones all arguments side by side.
    model = settings.get("model", settings) if isinstance(settings, dict) else {}
    task = settings.get("task", settings) if isinstance(settings, dict) else {}
    normalise = task.get("normalize") if isinstance(task, dict) else None
    return Published(state, model if isinstance(model, dict) else {}, normalise)


class _StandIn:
    """Takes the place of a class that a pickle names: keeps the attributes that it is given, and runs nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __new__(cls, *_: Any, **__: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)

    def __setitem__(self, key: Any, value: Any) -> None: ...


_SAFE: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    *((kind, f"builtins.{kind.__name__}") for kind in (dict, list, tuple, int, float, str, bool)),
    *(
        (_StandIn, name)
        for name in (
            "omegaconf.dictconfig.DictConfig",
            "omegaconf.listconfig.ListConfig",
            "omegaconf.base.Metadata",
            "omegaconf.base.ContainerMetadata",
            *(
                f"omegaconf.nodes.{kind}Node"
                for kind in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Bytes", "Path", "Value")
            ),
            "typing.Any",
            "fairseq.data.dictionary.Dictionary",
            "numpy.dtype",
            "numpy.core.multiarray.scalar",
            "numpy._core.multiarray.scalar",
        )
    ),
]


def _unpickle(path: Path) -> Mapping[str, Any]:
    """The dictionary that ``torch.save`` wrote; raises WeightsError for anything but tensors and settings in it."""
    try:
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise WeightsError("no checkpoint of torch.save, or a damaged one") from error
        raise WeightsError(
            f"its pickle names {named[1]}, which reading could run as code, so it is not read: where you trust the "
            'file, write its tensors alone, torch.save({"model": torch.load(FILE, weights_only=False)["model"]}, NEW)'
        ) from error
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"no checkpoint of torch.save, or a damaged one ({type(error).__name__})") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"holds a {type(content).__name__}: a dictionary with the tensors is needed")
    return content


def _plain(value: Any) -> Any:
    """Settings as dictionaries and values, from argparse's or, by its stand-ins' attributes, omegaconf's objects."""
    if isinstance(value, argparse.Namespace | _StandIn):
        attributes = vars(value)
        value = attributes.get("_content", attributes.get("_val", attributes))
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value
