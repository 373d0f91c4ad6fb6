"""`python -m tests.benchmarks.claims [--out claims] [--only ksom]`: prints the tables as markdown, and keeps them in
OUT/CLAIM.md."""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a run is one rank

CLAIMS = ("vit_som", "ksom", "affine", "simplex", "collapse")


def main() -> None:
    from pipeline.data.storage import write_whole
    from tests.benchmarks.claims import claim as claims

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("claims"), help="folder for data sets, runs and tables")
    parser.add_argument("--corpus", type=Path, help="tree of tests.benchmarks.corpus (default: made in OUT)")
    parser.add_argument("--data", type=Path, help="a prepared data set instead of the corpus, such as CIFAR-10")
    parser.add_argument("--only", nargs="+", choices=CLAIMS, default=CLAIMS)
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, … of each row")
    parser.add_argument("--full", action="store_true", help="the recipes' own sizes and steps: for a GPU")
    parser.add_argument("overrides", nargs="*", help="more overrides of every row: key=value")
    options = parser.parse_args()
    for name in options.only:
        claim = import_module(f"tests.benchmarks.claims.{name}").CLAIM
        data = options.data or claims.prepare(claim.data, claim.split, options.out, options.corpus)
        length = "full" if options.full else "quick"
        folder = options.out / "runs" / f"{name}-{length}"
        found = claims.outcomes(claim, data, folder, full=options.full, seeds=options.seeds, changes=options.overrides)
        first = found[0][1]
        steps, seeds = first[0].metrics["step"], len(first)
        text = (
            f"## {claim.title}\n\n{claim.about}\n\n`{claim.recipe}`, {steps} steps, {seeds} seed{'s' * (seeds > 1)}; "
            f"in brackets the paper's.\n\n{claims.table(claim, found)}\n"
        )
        write_whole(options.out / f"{name}-{length}.md", text.encode())
        print(text, flush=True)


if __name__ == "__main__":
    main()
