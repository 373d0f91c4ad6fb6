"""Training: `train(recipe, run_dir)` on the ranks that exist, and `Run`, the folder it fills."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.training.loop import train
    from pipeline.training.run_folder import Run

__all__ = ["train", "Run"]


def __getattr__(name: str) -> Any:
    # `recipes.schema` reads pipeline.training.config: the loop, and with it DeepSpeed and the models, loads only when
    # asked for.
    if name == "train":
        from pipeline.training.loop import train

        return train
    if name == "Run":
        from pipeline.training.run_folder import Run

        return Run
    raise AttributeError(name)
