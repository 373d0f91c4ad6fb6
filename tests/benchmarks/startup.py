"""How long the command line takes to answer, beside the interpreter's own start.

`python -m tests.benchmarks.startup` times whole processes, the commands by turns, and prints the least and the median
of each and the ratio to `python -c pass` in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

TESSERA = str(Path(sys.executable).with_name("tessera"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "tessera --help": [TESSERA, "--help"],
    "tessera train --help": [TESSERA, "train", "--help"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7, help="counted runs of each command, after one that is not")
    runs = parser.parse_args().runs
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(runs + 1):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if number:
                seconds[name].append(time.perf_counter() - started)
    floor = statistics.median(seconds["python -c pass"])
    print(f"{'command':<26} {'least s':>8} {'median s':>9} {'ratio':>6}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<26} {min(values):8.3f} {median:9.3f} {median / floor:6.1f}")


if __name__ == "__main__":
    main()
