"""From a run to what others use: `export` for weights in a format of theirs, `tokenize` for a data set's codes,
`decode` for the images that codes stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.export.decoding import decode
    from pipeline.export.tokens import tokenize
    from pipeline.export.weights import export, load_quantizer

__all__ = ["decode", "export", "load_quantizer", "tokenize"]


def __getattr__(name: str) -> Any:
    if name == "decode":
        from pipeline.export.decoding import decode

        return decode
    if name == "export":
        from pipeline.export.weights import export

        return export
    if name == "load_quantizer":
        from pipeline.export.weights import load_quantizer

        return load_quantizer
    if name == "tokenize":
        from pipeline.export.tokens import tokenize

        return tokenize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
