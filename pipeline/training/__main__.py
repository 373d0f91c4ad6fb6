"""`python -m pipeline.training RECIPE [key=value …] --run-dir DIR`: one rank.

What torchrun, `accelerate launch -m`, DeepSpeed's runner and Slurm's srun start on each rank.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from pipeline.training.stop import RESUME_ME, Interrupted, leave_when_told


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.training", description=__doc__)
    parser.add_argument("recipe", help="a recipe file or the name of a bundled recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides")
    # torchrun takes --run for an abbreviation of its own --run-path, even behind the module's name.
    parser.add_argument("--run-dir", required=True, help="run folder; training starts where it left off")
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps into DIR/profile")
    parser.add_argument(
        "--interrupted-code",
        type=int,
        default=RESUME_ME,
        help="exit code of a run that a signal stopped and that can go on (default %(default)s)",
    )
    arguments, unknown = parser.parse_known_intermixed_args()
    # DeepSpeed's runner appends --local_rank=N; the same number is in the environment.
    rest = [argument for argument in unknown if not argument.startswith("--local_rank")]
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    leave_when_told(arguments.interrupted_code)
    share_cores()
    # torch gives back a large tensor's memory: Linux clears it anew in every step, faster in few huge pages.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # gloo announces each connection as a warning
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    from pipeline import collectives
    from pipeline.training.loop import train
    from pipeline.training.peer_loss import PeerLost
    from pipeline.training.run_lock import RunInUse
    from recipes.schema import RecipeError, load_recipe

    try:
        train(load_recipe(arguments.recipe, arguments.overrides), arguments.run_dir, profile=arguments.profile)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (PeerLost, RunInUse) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"{stopped}: {arguments.run_dir} goes on when it is started again", file=sys.stderr)
        collectives.leave()
        return arguments.interrupted_code
    collectives.leave()
    return 0


def share_cores() -> None:
    """Give this rank its part of the cores under DeepSpeed's launcher, which leaves them all to each rank of a node.

    What else starts ranks shares them out itself. Before torch is imported.
    """
    if "LOCAL_SIZE" in os.environ:
        threads = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"])
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))


if __name__ == "__main__":
    sys.exit(main())
