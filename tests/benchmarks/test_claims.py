"""The tables of the papers' claims: rows are recipes, cells are figures of runs."""

from importlib import import_module

import pytest

from pipeline.evaluation.history import History
from recipes.schema import load_recipe
from tests.benchmarks.claims.__main__ import CLAIMS
from tests.benchmarks.claims.claim import Claim, Outcome, Row, last_logged, metric, steps_to_within, table


def run(values: list[float], **metrics: float) -> Outcome:
    lines = [{"step": 10 * (place + 1), "mse": value} for place, value in enumerate(values)]
    return Outcome(metrics, History(lines))


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.parametrize("full", [False, True])
def test_every_row_is_a_recipe_of_its_own(name, full):
    claim = import_module(f"tests.benchmarks.claims.{name}").CLAIM
    recipes = [load_recipe(claim.recipe, [*(() if full else claim.quick), *row.overrides]) for row in claim.rows]
    assert len({recipe.to_yaml() for recipe in recipes}) == len({row.name for row in claim.rows}) == len(claim.rows)
    assert all(set(row.paper) <= set(claim.columns) for row in claim.rows)


def test_a_table_has_the_papers_values_behind_ours():
    columns = {"MSE × 1000": metric("mse", 1, 1000), "last": last_logged("mse", 2, lines=2)}
    rows = [Row("a", (), {"MSE × 1000": "5.65"}), Row("b", ())]
    claim = Claim("title", "about", "recipe", "tiles", rows, columns)
    found = [
        (rows[0], [run([3.0, 2.0, 1.0], mse=0.004), run([1.0, 1.0, 1.0], mse=0.006)]),
        (rows[1], [run([1.0], perplexity=2.0)]),
    ]
    assert table(claim, found).splitlines() == [
        "|  | MSE × 1000 | last |",
        "| --- | --- | --- |",
        "| a | 5.0 [4.0, 6.0] (5.65) | 1.25 [1.00, 1.50] |",
        "| b | – | 1.00 |",
    ]


def test_steps_are_counted_until_a_curve_comes_near_its_own_best():
    assert steps_to_within("mse", 0.2)([run([2.0, 1.15, 1.0]), run([1.0, 3.0, 5.0])]) == "15 [10, 20]"
    assert steps_to_within("mse", 0.1)([run([2.0, 1.15, 1.0])]) == "30"
