"""Shows a run while other processes train it, by reading its log.jsonl.

In: a run folder and its recipe. Out: a rich progress bar on a terminal, a line now and then elsewhere. Imports
no torch.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from recipes.schema import Recipe

SECONDS_BETWEEN_LINES = 10.0


class LogReader:
    """Reads the lines that a log file has gained since the last call; a torn last line waits for its end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._position = file.stat().st_size if file.is_file() else 0

    def new_lines(self) -> list[dict[str, Any]]:
        if not self.file.is_file():
            return []
        with self.file.open("rb") as stream:
            stream.seek(self._position)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        lines = []
        for line in whole.splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # torn by a kill, ended by the resumed run
                continue
        return lines


LEARNING = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "class_accuracy": "accuracy {:.1%}",
    "codebook_perplexity": "perplexity {:.1f}",
    "codebook_usage": "usage {:.0%}",
    "grad_norm": "gradient {:.2g}",
    "learning_rate": "lr {:.1e}",
}
SPEED = {
    "samples_per_second": "{:,.1f} samples/s",
    "audio_per_second": "{:,.1f} s of audio/s",
    "tokens_per_second": "{:,.0f} tokens/s",
    "flop_utilisation": "{:.0%} of peak FLOP/s",
    "data_wait_share": "{:.0%} waiting for data",
    "all_reduce_share": "{:.0%} in all-reduce",
}
MEMORY = {"memory": "memory {:.1f} GiB", "memory_gpu": "GPU {:.1f} GiB"}


def describe_line(line: dict[str, Any]) -> str:
    """What a log line tells of learning, in a few words."""
    words = _words(line, LEARNING)
    for collapse in ("tokens", "embeddings"):
        if line.get(f"collapse_{collapse}"):
            words.append(f"{collapse} collapse")
    if line.get("skipped"):
        words.append(f"{line['skipped']} steps skipped")
    return "  ".join(words)


def describe_speed(line: dict[str, Any]) -> str:
    """What a log line tells of speed and memory, in a few words."""
    return "  ".join(_words(line, SPEED) + _words(line, MEMORY, 2**30))


def _words(line: dict[str, Any], forms: dict[str, str], unit: float = 1) -> list[str]:
    return [form.format(line[key] / unit) for key, form in forms.items() if isinstance(line.get(key), int | float)]


class Follow:
    """Context manager: while it is open, a thread shows the run's progress; with ``warnings`` also the run's warnings,
    for ranks whose own output is not seen here."""

    def __init__(self, run: Path, recipe: Recipe, console: Console | None = None, *, warnings: bool = False) -> None:
        from pipeline.training.run_folder import Run

        self._console = console or Console()
        phases = Run(run).phases(recipe)
        self._logs = []  # of each phase: its log, its steps, its title
        for number, (folder, phase) in enumerate(phases, start=1):
            title = f"{recipe.name}, phase {number} of {len(phases)}" if len(phases) > 1 else recipe.name
            self._logs.append((LogReader(folder.log_file), phase.training.steps, title))
        self._warnings = warnings
        self._attempts: dict[str, int] = {}  # by title, that of the newest line
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tessera-follow", daemon=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Follow:
        self._progress.start()
        self._task = self._progress.add_task(self._logs[0][2], total=self._logs[0][1], state="starting the ranks …")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._progress.stop()

    def _loop(self) -> None:
        self._said = 0.0
        while True:
            last_round = self._stop.is_set()
            for reader, steps, title in self._logs:
                for line in reader.new_lines():
                    self._show(line, steps, title)
            if last_round:
                return
            self._stop.wait(0.3)

    def _show(self, line: dict[str, Any], steps: int, title: str) -> None:
        if self._attempts.setdefault(title, line["attempt"]) != line["attempt"]:
            self._console.print(f"  {title}: resumed, first line at step {line['step']}")
        self._attempts[title] = line["attempt"]
        for warning in line.get("warnings", []) if self._warnings else []:
            self._console.print(
                f"  {title}: warning at step {line['step']}: {warning}", soft_wrap=True, highlight=False
            )
        learning, speed = describe_line(line), describe_speed(line)
        self._progress.update(
            self._task, description=title, total=steps, completed=line["step"], state=f"{learning}\n{speed}"
        )
        done = line["step"] >= steps
        if not self._console.is_terminal and (done or time.monotonic() - self._said >= SECONDS_BETWEEN_LINES):
            state = "  ".join(filter(None, [learning, speed]))
            self._console.print(f"  {title}: step {line['step']}/{steps}  {state}", soft_wrap=True, highlight=False)
            self._said = time.monotonic()
