"""Models: `build_model(model, quantizer)`, and `build_collation(recipe)` for the micro-batches that they read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.models.build import build_collation, build_model

__all__ = ["build_model", "build_collation"]


def __getattr__(name: str) -> Any:
    # The schema reads pipeline.models.config: torch and fairseq2 load only when a model is built.
    if name in __all__:
        from pipeline.models import build

        return getattr(build, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
