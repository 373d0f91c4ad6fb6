"""`python -m tests.benchmarks.behaviour [--only ksom] [--seeds 1]`: prints the tables as markdown."""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks this small gain nothing from a second core; before torch

from tests.benchmarks.behaviour import collapse, knn, ksom

TABLES = {"ksom": ksom, "collapse": collapse, "knn": knn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=TABLES, help="one table instead of all")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, … of each row; default: as many as the specification")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of each phase")
    options = parser.parse_args()
    print("Ours (the specification's), means over seeds.")
    for name, table in TABLES.items():
        if options.only in (None, name):
            started = time.process_time()
            seeds = range(options.seeds or table.SEEDS)
            results = {row: [table.run(row, seed, options.steps) for seed in seeds] for row in table.ROWS}
            seconds = time.process_time() - started
            print(f"\n## {table.TITLE}\n\n{len(seeds)} seeds, {options.steps} steps, {seconds:.0f} s of CPU time.\n")
            print(table.table(results), flush=True)


if __name__ == "__main__":
    main()
