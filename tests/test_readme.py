"""README names nothing that is not there: commands, options, recipes, keys, modules, files; and its snippet runs."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from click import Context
from typer.main import get_command

from launch.cli import app
from pipeline.quantizers.registry import KINDS
from recipes.overrides import kinds_of
from recipes.schema import RECIPE_FOLDER, Recipe, load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
"""What stands in backticks."""
LINES = [line.split("  #")[0].strip() for line in re.sub(r"\\\n *", "", README).splitlines() if line.startswith("    ")]
"""What stands indented, without comments."""
COMMANDS = [line.replace("launch …", "launch speech/wav2vec2_base --run R") for line in LINES if line[:8] == "tessera "]
UNIONS = ("model", "quantizer")


def _parse(line: str) -> Context:
    """As the command line does, without doing it; raises click's UsageError."""
    command, rest = get_command(app), shlex.split(line)[1:]
    context = Context(command)
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
    return command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_can_be_given(line):
    given = _parse(line).params
    if "recipe" in given:
        recipe = load_recipe(given["recipe"], given["overrides"] or [])
        recipe.check_ranks(given.get("ranks") or given.get("nodes", 1) * given.get("ranks_per_node", 1))


def test_there_are_commands():
    assert {line.split()[1] for line in COMMANDS} >= {"prepare", "plan", "train", "launch", "evaluate", "tokenize"}


def test_all_recipes_and_quantizers_are_told_of():
    recipes = {file.stem for file in RECIPE_FOLDER.glob("*/*.yaml")}
    assert recipes | KINDS.keys() <= set(CODE)


def test_keys_of_recipes_exist():
    keys = {key for code in CODE for key in re.findall(r"(?<![\w./-])([a-z]+\.[a-z_.]+[a-z])(?==|$)", code)}
    keys = {
        key for key in keys if key.split(".")[0] in Recipe.model_fields and Path(key).suffix not in (".pt", ".yaml")
    }
    assert len(keys) > 20
    for key in sorted(keys):
        section, name, *_ = key.split(".")
        kinds = kinds_of(section).values() if section in UNIONS else [Recipe.model_fields[section].annotation]
        assert any(name in kind.model_fields for kind in kinds), key


def test_files_and_modules_exist():
    folders = "pipeline|recipes|data_prep|launch|tests"
    paths = [code for code in CODE if re.match(rf"({folders})/", code)] + ["LICENSE", "pyproject.toml"]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    modules = set(re.findall(r"python -m ([\w.]+)", README))
    assert [module for module in modules if importlib.util.find_spec(module) is None] == []


def test_the_snippet_runs():
    [snippet] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"latents": torch.randn(2, 5, 64)}
    exec(snippet, names)
    assert names["out"].codes.shape == (2, 5, 1)


def test_lines_are_short():
    lines = [line for line in README.splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []
