"""`python -m tests.end_to_end.recorded_training KEYS …`: `python -m pipeline.training …` that notes what it trains on.

In: a folder, then the trainer's own arguments. Out: in that folder one file a process, with a line of JSON for each
micro-batch that the loop took: step, number, the samples' keys. Nothing else differs from the trainer. Under Ray the
same is done in each worker by :func:`worker_environment`.
"""

import json
import os
import sys
from pathlib import Path

from pipeline import data
from pipeline.training.__main__ import main

FOLDER = "RECORDED_TRAINING_FOLDER"


def record(folder: Path) -> None:
    """Every loader of this process notes what it hands out. Call it before the training loop is imported."""

    def build(*arguments, start_step, **options):
        from pipeline.data.loader import build_loader  # here, for not every worker of Ray trains

        folder.mkdir(parents=True, exist_ok=True)
        loader = build_loader(*arguments, start_step=start_step, **options)
        notes = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)
        take = type(loader).__next__
        step = start_step

        class Recorded(type(loader)):
            def __next__(self):
                nonlocal step
                batches = take(self)
                for batch in batches:
                    notes.write(json.dumps({"step": step, "number": batch.number, "keys": batch.keys}) + "\n")
                step += 1
                return batches

        loader.__class__ = Recorded
        return loader

    data.build_loader = build


def record_in_worker() -> None:
    """What Ray calls in each of its workers."""
    record(Path(os.environ[FOLDER]))


def worker_environment(folder: Path) -> dict[str, str]:
    """Variables with which a process that joins a Ray cluster makes all workers of its job record."""
    environment = {
        "worker_process_setup_hook": f"{__name__}.{record_in_worker.__name__}",
        "env_vars": {FOLDER: str(folder)},
    }
    return {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": environment})}


def trained_keys(folder: Path) -> dict[tuple[int, int], list[str]]:
    """Keys by (step, micro-batch). Raises AssertionError when a step was ever trained on other samples than before."""
    found: dict[tuple[int, int], list[str]] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            try:
                note = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill
                continue
            place = note["step"], note["number"]
            assert found.setdefault(place, note["keys"]) == note["keys"], f"step, micro-batch {place}"
    return found


if __name__ == "__main__":
    record(Path(sys.argv.pop(1)))
    sys.exit(main())
