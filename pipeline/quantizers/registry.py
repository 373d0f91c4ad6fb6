"""The kinds of quantizer, by name: one line a kind.

In: a validated configuration or a mapping. Out: a quantizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from pipeline.quantizers.base import Quantizer
from pipeline.quantizers.ema import EMAConfig, EMAQuantizer
from pipeline.quantizers.identity import IdentityConfig, IdentityQuantizer
from pipeline.quantizers.ksom import KSOMConfig, KSOMQuantizer

KINDS: dict[str, tuple[type[BaseModel], Any]] = {
    "identity": (IdentityConfig, IdentityQuantizer),
    "ema": (EMAConfig, EMAQuantizer),
    "ksom": (KSOMConfig, KSOMQuantizer),
}

QuantizerConfig = Annotated[IdentityConfig | EMAConfig | KSOMConfig, Field(discriminator="kind")]


def build_quantizer(config: QuantizerConfig | Mapping[str, Any], **extra: Any) -> Quantizer:
    """A quantizer of ``config.kind``; ``extra`` are options that stand above those of ``config``, such as ``dim``.

    >>> quantizer = build_quantizer({"kind": "ksom", "dim": 64, "codes": 512})

    Raises ValueError (pydantic's ValidationError is one) for an unknown kind or option and for an impossible value.
    """
    options = {**(config.model_dump() if isinstance(config, BaseModel) else config), **extra}
    kind = options.get("kind")
    if kind not in KINDS:
        raise ValueError(f"quantizer.kind={kind!r} is unknown: use {', '.join(KINDS)}")
    config_class, quantizer_class = KINDS[kind]
    validated: Any = config_class.model_validate(options)
    if validated.dim is None:
        raise ValueError(f"quantizer.dim is missing: a {kind} quantizer needs the size of its vectors, such as dim=64")
    return quantizer_class(validated)
