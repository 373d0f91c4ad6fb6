"""Heat maps of the use of codes over training, of real checkpoints and of made ones with several codebooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.evaluation.history import History
from pipeline.evaluation.run_view import RunView, open_runs
from pipeline.evaluation.usage_figures import COLUMNS, even_use, read_counts, usage_pictures
from pipeline.models import build_model
from pipeline.training.checkpoint import buffer_key, checkpoint_name
from pipeline.training.run_folder import Run
from recipes.schema import load_recipe
from tests.conftest import IMAGE, train
from tests.evaluation.test_report import Reader


def test_a_run_with_several_checkpoints_shows_their_counts(
    image_run: Path, image_dataset: Path, tmp_path: Path
) -> None:
    resumed = shutil.copytree(image_run, tmp_path / "run")
    train("image/autoencoder_tiny_ksom", image_dataset, resumed, 6, *IMAGE, "training.checkpoint_every=1")
    steps, tables = read_counts(Run(resumed), ["quantizer"])
    assert steps == [4, 5, 6]
    for place, checkpoint in enumerate(Run(resumed).list_checkpoints()):
        model, _ = Run(resumed).load_model(checkpoint)
        assert torch.equal(tables["quantizer"][place], model.quantizer.code_counts)
    [view] = open_runs([resumed])
    reader = Reader("".join(usage_pictures([view])))
    assert "Use over training" in reader.labels
    assert "over some 100 steps" in "".join(reader.words)
    # one that can't be read is left out
    (resumed / "checkpoints" / checkpoint_name(5) / "rank-00000.safetensors").write_bytes(b"torn")
    assert read_counts(Run(resumed), ["quantizer"])[0] == [4, 6]


def test_one_checkpoint_has_no_history(image_run: Path) -> None:
    assert usage_pictures(open_runs([image_run])) == []


def test_codes_are_sorted_by_their_use_at_the_end() -> None:
    counts = torch.tensor([[3.0, 0.0, 1.0, 0.0], [0.0, 5.0, 20.0, 0.0]])
    expected = torch.tensor([[1.0, 3.2], [0.0, 0.8], [3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(even_use(counts), expected)
    in_pairs = torch.tensor([[0.5, 2.0], [1.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(even_use(counts, to_a_row=2), in_pairs)


def make_checkpoints(run: Path, steps: range, counts: dict[str, torch.Tensor]) -> None:
    """What the figures read of checkpoints: the manifest, and counts that grow with the step."""
    for step in steps:
        folder = run / "checkpoints" / checkpoint_name(step)
        folder.mkdir(parents=True)
        values = {buffer_key(f"{name}.code_counts"): table * step for name, table in counts.items()}
        save_file(values, folder / "rank-00000.safetensors")
        manifest = {"format_version": 2, "step": step, "world_size": 1, "zero_stage": 0, "precision": "fp32"}
        manifest |= {"loss": None, "data_fingerprint": "", "codebook_checksum": "", "parameters": {}}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"optimizer_steps": {}, "files": {}}))


@pytest.mark.parametrize(
    ("overrides", "counts", "figures", "words"),
    [
        (
            ["quantizer.kind=ema", "quantizer.codes=300", "quantizer.groups=2", "quantizer.update_empty=false"],
            {"quantizer": (2, 300)},
            ["group 1", "group 2"],
            "A code that nothing chose keeps its value",
        ),
        (
            ["quantizer.kind=residual", "quantizer.codes=8", "quantizer.levels=9", "quantizer.level.kind=ema"],
            {f"quantizer.levels.{level}": (1, 8) for level in range(9)},
            [f"quantizer.levels.{level}" for level in range(8)],
            "The first 8 of 9 codebooks.",
        ),
        (["quantizer.kind=ste"], {}, [], ""),
    ],
)
def test_every_codebook_has_its_figure(
    overrides: list[str], counts: dict[str, tuple[int, int]], figures: list[str], words: str, tmp_path: Path
) -> None:
    recipe = load_recipe("image/autoencoder_tiny_ksom", ["model.channels=16", *overrides])
    model = build_model(recipe.model, recipe.quantizer)
    make_checkpoints(tmp_path, range(1, COLUMNS + 12), {name: torch.rand(shape) for name, shape in counts.items()})
    view = RunView("a run", tmp_path, "#3b7fc4", recipe, History([]), {}, None, model, None, "")
    reader = Reader("".join(usage_pictures([view])))
    assert reader.labels == figures
    assert words in "".join(reader.words)
    steps, tables = read_counts(Run(tmp_path), list(counts))
    assert all(len(table) == len(steps) == COLUMNS for table in tables.values())
    assert not steps or (steps[0], steps[-1]) == (1, COLUMNS + 11)
