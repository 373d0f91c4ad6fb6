"""Weights of a measuring network, from a file that the user names: known by their SHA-256, and checked by name and
shape.

In: a path. Out: tensors, and the file's hash. Nothing is downloaded, and nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pipeline.models.published import WeightsError, read_published

SHOWN = 3


@dataclass(frozen=True)
class GivenWeights:
    """What a file holds, and which file it is."""

    file: Path
    sha256: str
    state: dict[str, Tensor]


def read_given(file: str | Path) -> GivenWeights:
    """Read the tensors of a safetensors file or of ``torch.save``.

    Raises :class:`WeightsError` naming the file when it is missing, damaged, or more than tensors.
    """
    file = Path(file)
    try:
        state = read_published(file).state
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    with file.open("rb") as content:
        return GivenWeights(file, hashlib.file_digest(content, "sha256").hexdigest(), state)


def put_given(module: nn.Module, state: Mapping[str, Tensor], file: Path, wanted: str) -> None:
    """Make ``state`` the weights of ``module``, in fp32 and frozen; counters of batch norms are left out.

    Raises :class:`WeightsError` naming ``file``, what was ``wanted`` and the first names that are missing, not known or
    of another shape.
    """
    own = {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    problems = [f"{name} is missing" for name in own.keys() - given.keys()]
    problems += [f"{name} is not known" for name in given.keys() - own.keys()]
    problems += [
        f"{name} is {tuple(given[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & given.keys()
        if own[name].shape != given[name].shape
    ]
    if problems:
        more = f", and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise WeightsError(f"{file} does not hold {wanted}: {'; '.join(sorted(problems)[:SHOWN])}{more}")
    module.load_state_dict({name: tensor.float() for name, tensor in given.items()}, strict=False, assign=True)
    module.requires_grad_(False)
