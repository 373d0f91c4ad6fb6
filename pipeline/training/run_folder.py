"""The run folder: where a run's recipe, log and checkpoints lie, and how they are read back.

In: a path. Out: :class:`Run`. Evaluation, export, tokenisation and the report read runs through it; only the trainer
writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.training.checkpoint import CheckpointError, find_latest, list_checkpoints

if TYPE_CHECKING:
    from recipes.schema import Recipe

MAY_CHANGE = (
    "training.",
    "engine.",
    "data.path",
    "data.mix",  # a data set may move; the checkpoint's data state refuses other weights, splits and contents
    "model.perceptual.network",  # a file may move; its hash stays
    "data.cache",
    "data.prefetch",
    "data.threads",
    "codebooks.check_every",
    "description",
)
"""Keys of a recipe, and of its phases, that may differ when a run is resumed."""
STAYS = ("training.weight_ema",)
"""But for these."""
_PHASE = re.compile(r"^phases\.\d+\.")


class Run:
    """A run folder on disk.

    RUN/recipe.yaml  RUN/environment.json  RUN/log.jsonl  RUN/tensorboard/
    RUN/checkpoints/step-00001000/  RUN/metrics.json  RUN/report.html

    A recipe with phases trains the last one in RUN itself and those before in RUN/phases/1, 2 …, run folders each.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment_file(self) -> Path:
        return self.path / "environment.json"

    @property
    def log_file(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.recipe_file.is_file()

    def recipe(self) -> Recipe:
        """The run's recipe; raises FileNotFoundError naming the folder when it holds none."""
        from recipes.schema import load_recipe

        if not self.exists():
            raise FileNotFoundError(
                f"{self.path} is not a run folder (no recipe.yaml): give the --run folder of `tessera train`"
            )
        return load_recipe(self.recipe_file)

    def phases(self, recipe: Recipe) -> list[tuple[Run, Recipe]]:
        """The folder and the recipe of each phase, in turn; of a run without phases its own."""
        before = [Run(self.path / "phases" / str(number)) for number in range(1, len(recipe.in_turn))]
        return list(zip([*before, self], recipe.in_turn, strict=True))

    def check_recipe(self, recipe: Recipe) -> None:
        """Raise RecipeError unless the folder is new or ``recipe`` continues its run.

        A resumed run may change how long it is, how often it logs and saves, where the data lies and how the engine
        works; anything that would make another run of it is refused with each changed key. So is another length of a
        phase that a later one has begun with.
        """
        from recipes.schema import RecipeError, changed_keys

        changed = changed_keys(self.recipe(), recipe) if self.exists() else {}
        begun = [number for number, (folder, _) in enumerate(self.phases(recipe)) if folder.list_checkpoints()]
        ended = {f"phases.{number}.training.steps" for number in range(max(begun, default=0))}
        refused = {
            key: values for key, values in changed.items() if key in ended or not _may_change(_PHASE.sub("", key))
        }
        if refused:
            lines = "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in refused.items())
            raise RecipeError(
                f"{self.path} was trained by another recipe:\n{lines}\nchange these back, or give another --run folder"
            )

    def environment(self) -> dict[str, Any]:
        """Versions, hosts and process ids of the last start."""
        return json.loads(self.environment_file.read_text())

    def log(self) -> list[dict[str, Any]]:
        """Every log line, oldest first; a line torn by a kill is left out. Steps repeat after a resume: ``attempt``."""
        if not self.log_file.is_file():
            return []
        lines = []
        for line in self.log_file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return lines

    def list_checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return list_checkpoints(self.checkpoints)

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, every file's hash compared, or None."""
        return find_latest(self.checkpoints)[0]

    def load_model(self, checkpoint: Path | None = None, device: str = "cpu", raw: bool = False) -> tuple[Any, Recipe]:
        """The trained model (an ``nn.Module`` in evaluation mode, weights and codebooks in fp32) and the recipe.

        ``checkpoint`` is one of :meth:`list_checkpoints`, by default the latest whole one. The weights are averaged
        where the run has averaged them (``training.weight_ema``), and with ``raw`` those that were trained. Raises
        CheckpointError when there is none.
        """
        from pipeline.models import build_model
        from pipeline.training.checkpoint import read_weights

        recipe = self.recipe()
        checkpoint = checkpoint or self.latest_checkpoint()
        if checkpoint is None:
            raise CheckpointError(
                f"{self.checkpoints} holds no whole checkpoint: train first, `tessera train RECIPE --run {self.path}`"
            )
        model = build_model(recipe.model, recipe.quantizer)
        model.load_state_dict(read_weights(checkpoint, raw=raw))
        return model.to(device).eval(), recipe


def _may_change(key: str) -> bool:
    return key.startswith(MAY_CHANGE) and key not in STAYS
