"""The kinds of quantizer, by name: one line a kind.

In: a validated configuration or a mapping. Out: a quantizer.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from pipeline.quantizers.affine import AffineConfig, AffineQuantizer
from pipeline.quantizers.base import Quantizer
from pipeline.quantizers.ema import EMAConfig, EMAQuantizer
from pipeline.quantizers.fsq import FSQConfig, FSQQuantizer
from pipeline.quantizers.gd_som import GDSOMConfig, GDSOMQuantizer
from pipeline.quantizers.gumbel import GumbelConfig, GumbelQuantizer
from pipeline.quantizers.identity import IdentityConfig, IdentityQuantizer
from pipeline.quantizers.knn_simplex import KNNSimplexConfig, KNNSimplexQuantizer
from pipeline.quantizers.ksom import KSOMConfig, KSOMQuantizer
from pipeline.quantizers.lfq import LFQConfig, LFQQuantizer
from pipeline.quantizers.residual import LEVEL_KINDS, ResidualConfig, ResidualQuantizer
from pipeline.quantizers.rotation import RotationConfig, RotationQuantizer
from pipeline.quantizers.simvq import SimVQConfig, SimVQQuantizer
from pipeline.quantizers.som import SOMConfig, SOMQuantizer
from pipeline.quantizers.ste import STEConfig, STEQuantizer

KINDS: dict[str, tuple[type[BaseModel], Any]] = {
    "identity": (IdentityConfig, IdentityQuantizer),
    "ema": (EMAConfig, EMAQuantizer),
    "ksom": (KSOMConfig, KSOMQuantizer),
    "gd_som": (GDSOMConfig, GDSOMQuantizer),
    "som": (SOMConfig, SOMQuantizer),
    "ste": (STEConfig, STEQuantizer),
    "affine": (AffineConfig, AffineQuantizer),
    "knn_simplex": (KNNSimplexConfig, KNNSimplexQuantizer),
    "gumbel": (GumbelConfig, GumbelQuantizer),
    "simvq": (SimVQConfig, SimVQQuantizer),
    "rotation": (RotationConfig, RotationQuantizer),
    "fsq": (FSQConfig, FSQQuantizer),
    "lfq": (LFQConfig, LFQQuantizer),
    "residual": (ResidualConfig, ResidualQuantizer),
}

QuantizerConfig = Annotated[
    IdentityConfig
    | EMAConfig
    | KSOMConfig
    | GDSOMConfig
    | SOMConfig
    | STEConfig
    | AffineConfig
    | KNNSimplexConfig
    | GumbelConfig
    | SimVQConfig
    | RotationConfig
    | FSQConfig
    | LFQConfig
    | ResidualConfig,
    Field(discriminator="kind"),
]


def build_quantizer(config: QuantizerConfig | Mapping[str, Any], **extra: Any) -> Quantizer:
    """A quantizer of ``config.kind``; ``extra`` are options that the model supplies, such as ``dim``.

    >>> quantizer = build_quantizer({"kind": "ksom", "dim": 64, "codes": 512})

    Raises ValueError for an unknown kind or option, for an impossible value, for a missing ``dim``, and for an option
    that ``config`` and ``extra`` give different values.
    """
    options = dict(config.model_dump() if isinstance(config, BaseModel) else config)
    for name, value in extra.items():
        if options.get(name) not in (None, value):
            raise ValueError(
                f"quantizer.{name}={options[name]!r} is not the model's {value!r}: leave quantizer.{name} out, "
                f"or use {value!r}"
            )
        options[name] = value
    kind = options.get("kind")
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"quantizer.kind={kind!r} is unknown: use {', '.join(KINDS)}{hint}")
    config_class, quantizer_class = KINDS[kind]
    try:
        validated: Any = config_class.model_validate(options)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(problem, config_class) for problem in error.errors())) from error
    if validated.dim is None:
        raise ValueError(f"quantizer.dim is missing: a {kind} quantizer needs the size of its vectors, such as dim=64")
    return quantizer_class(validated)


def _explain(problem: Any, config_class: type[BaseModel]) -> str:
    """One clause for one of pydantic's problems: key, value, what would do."""
    location = [str(part) for part in problem["loc"]]
    # pydantic puts the kind of a residual quantizer's levels into the location; the user never wrote it there.
    if location[:1] == ["level"] and len(location) > 1 and location[1] in LEVEL_KINDS:
        config_class = KINDS[location.pop(1)][0]
    key = ".".join(["quantizer", *location])
    if problem["type"] == "union_tag_invalid":
        return f"{key}.kind={problem['ctx']['tag']!r}: can't be a level's; use {', '.join(LEVEL_KINDS)}"
    if problem["type"] == "extra_forbidden":
        known = list(config_class.model_fields)
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{key}={problem['input']!r}: unknown option; {hint}known here: {', '.join(known)}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}={problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
