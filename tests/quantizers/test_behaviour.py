"""What the papers say of their quantizers comes true on small autoencoders: the orderings of the specification's
acceptance tables. ``python -m tests.benchmarks.behaviour`` prints the tables, with more seeds and rows."""

from __future__ import annotations

import statistics

import pytest

from tests.benchmarks.behaviour import ksom

pytestmark = pytest.mark.slow


def _mean(results, name):
    return statistics.fmean(getattr(result, name) for result in results)


def _map(neighbourhood, update_empty, count_init, seeds):
    row = next(
        row
        for row in ksom.ROWS
        if (row.neighbourhood, row.update_empty, row.count_init) == (neighbourhood, update_empty, count_init)
    )
    return [ksom.run(row, seed) for seed in seeds]


@pytest.mark.parametrize(("update_empty", "count_init"), [(True, 0.0), (True, 1.0), (False, 1.0)])
def test_neighbours_halve_the_error_and_order_the_codes_on_the_grid(update_empty, count_init):
    without = _map("none", update_empty, count_init, range(2))
    hard = _map("hard", update_empty, count_init, range(2))
    assert _mean(hard, "mse") < 0.5 * _mean(without, "mse")
    assert _mean(hard, "correlation") > 0.25 > abs(_mean(without, "correlation"))


def test_without_neighbours_counts_from_0_collapse_where_unchosen_codes_stay_put():
    (collapsed,) = _map("none", update_empty=False, count_init=0.0, seeds=[0])
    (saved,) = _map("hard", update_empty=False, count_init=0.0, seeds=[0])
    assert collapsed.perplexity < 1.1
    assert collapsed.mse > 0.9  # of data whose variance is about 1
    assert saved.perplexity > 20
    assert saved.mse < 0.05
