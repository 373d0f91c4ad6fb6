"""What the sampling plan of a very large data set needs: seconds to build it and to reach a step far off, and memory.

`python -m tests.benchmarks.sampling_plan` writes data sets that are real but for their samples (manifests, length
histograms, and the indexes of those shards that are reached), and plans each in a process of its own. Memory is the
highest resident set of that process (VmHWM) less what it was after the imports; mapped pages of the histograms count.
A second table gives the padding in one epoch by the size of the windows. Lengths are drawn to be like LibriSpeech's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import BatchConfig, DataConfig, SamplingPlan, ShardedDataset
from pipeline.data.config import LENGTH_BIN, SAMPLE_RATE
from pipeline.data.index import RECORD, ShardIndex
from pipeline.data.lengths import LENGTHS_NAME, write_lengths
from pipeline.data.manifest import Manifest, ShardEntry, SplitEntry, write_manifest
from pipeline.data.storage import open_folder

SETS = [  # name, kind, shards, samples a shard
    ("speech-100M", "speech", 76_923, 1_300),  # 256 MB of FLAC
    ("images-100M", "image", 43_478, 2_300),  # 256 MB of JPEG
    ("speech-1G", "speech", 192_308, 5_200),  # 1 GB
    ("images-1G", "image", 108_696, 9_200),
]
EPOCHS = (0, 10)
BATCHES = {"speech": BatchConfig(micro_batches=64, seconds=87.5), "image": BatchConfig(micro_batches=64, samples=64)}
LIBRISPEECH = 216  # shards of 1,300 clips: 960 h
WINDOWS = (1, 4, 16, 64, LIBRISPEECH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=Path, help="measure this data set, and print JSON")
    parser.add_argument("--shuffle", default="window")
    parser.add_argument("--reach", type=Path, help="write the indexes that measuring this data set will read")
    parser.add_argument("--sets", nargs="*", default=[name for name, *_ in SETS], help="which to measure")
    arguments = parser.parse_args()
    if arguments.reach:
        measure(SimulatedDataset(arguments.reach))
    elif arguments.one:
        print(json.dumps(measure_in_this_process(arguments.one, arguments.shuffle)))
    else:
        compare(arguments.sets)


def compare(names: list[str]) -> None:
    print("| samples | shards | open, s | plan, s | step in epoch 0, s | in epoch 10, s | next step, s | memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for name, kind, shards, samples in SETS:
        if name in names:
            with tempfile.TemporaryDirectory() as folder:
                simulate(Path(folder), kind, shards, samples)
                _run("--reach", folder)
                print_row(kind, shards, json.loads(_run("--one", folder)), "")
                if (kind, shards) == ("image", 43_478):
                    full = json.loads(_run("--one", folder, "--shuffle", "full"))
                    print_row(kind, shards, full, ", data.shuffle=full")
    print("\n| data.window_shards | padding | told by the plan |\n|---|---|---|")
    lengths = draw_lengths(np.random.default_rng(1), LIBRISPEECH * 1_300)
    for window_shards in WINDOWS:
        padding, bound = measure_padding(lengths.reshape(LIBRISPEECH, 1_300), window_shards)
        what = f"{window_shards} (all)" if window_shards == LIBRISPEECH else f"{window_shards}"
        print(f"| {what} | {padding:.2%} | at most {bound:.2%} |")


def print_row(kind: str, shards: int, result: dict[str, Any], note: str) -> None:
    what = f"{result['samples'] / 1e6:,.0f} M {'clips' if kind == 'speech' else 'images'}{note}"
    times = [result[name] for name in ("open", "plan", "epoch 0", "epoch 10", "next")]
    cells = " | ".join(f"{seconds:.2f}" if seconds >= 0.01 else "< .01" for seconds in times)
    print(f"| {what} | {shards:,} | {cells} | {result['memory'] / 1e6:,.0f} |", flush=True)


def _run(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.benchmarks.sampling_plan", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def measure_in_this_process(folder: Path, shuffle: str) -> dict[str, Any]:
    before = highest_memory()
    began = time.perf_counter()
    dataset = ShardedDataset(folder)
    opened = time.perf_counter() - began
    return {"open": opened} | measure(dataset, shuffle) | {"memory": highest_memory() - before}


def measure(dataset: ShardedDataset, shuffle: str = "window") -> dict[str, Any]:
    """Seconds to plan, and to reach the last micro-batch of a step in the midst of each epoch."""
    batch = BATCHES[dataset.kind]
    times: dict[str, Any] = {"samples": len(dataset)}
    data = DataConfig.model_validate({"shuffle": shuffle})
    began = time.perf_counter()
    plan = SamplingPlan(dataset, batch, data, seed=1)
    times["plan"] = time.perf_counter() - began
    for epoch in EPOCHS:
        step = int((epoch + 0.637) * plan.steps_per_epoch)
        # A process that resumes there has computed nothing yet but what building the plan takes.
        fresh = SamplingPlan(dataset, batch, data, seed=1)
        began = time.perf_counter()
        references = fresh.micro_batch(step, batch.micro_batches - 1)
        times[f"epoch {epoch}"] = time.perf_counter() - began
        assert references[0].epoch == epoch
    began = time.perf_counter()
    fresh.micro_batch(step + 1, 0)
    times["next"] = time.perf_counter() - began
    return times


def highest_memory() -> int:
    """Highest resident set of this process, in bytes. (ru_maxrss would count the parent's before exec.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def measure_padding(lengths: np.ndarray, window_shards: int) -> tuple[float, float]:
    """Share of padding in the first epoch's tensors, and the plan's bound: ``lengths`` ``(shards, clips)``."""
    from tests.pipeline_data.shards import PlannedShards

    data = DataConfig(window_shards=window_shards)
    plan = SamplingPlan(PlannedShards(list(lengths)), BATCHES["speech"], data, seed=1)
    padded = real = 0
    for number in range(int(plan.micro_batches_per_epoch)):
        limits = [reference.limit for reference in plan.streams[0].micro_batch(number)]
        padded += len(limits) * max(limits)
        real += sum(limits)
    return 1 - real / padded, plan.padding_share


def draw_lengths(generator: np.random.Generator, count: int) -> np.ndarray:
    """Audio samples of clips like LibriSpeech's: three in five of 12 to 17 s, the others from 1.5 s on."""
    long, short = generator.normal(14.5, 1.2, count), generator.uniform(1.5, 14, count)
    seconds = np.clip(np.where(generator.random(count) < 0.6, long, short), 1.4, 24)
    return (seconds * SAMPLE_RATE).astype(np.int64)


def simulate(folder: Path, kind: str, shards: int, samples: int) -> None:
    """Manifest and length histograms of a data set that has no shards."""
    generator = np.random.default_rng(0)
    (folder / "train").mkdir()
    entries = [
        ShardEntry(
            file=f"train/shard-{number:06d}.tar",
            sha256=generator.bytes(32).hex(),
            bytes=samples * 200_000,
            index_sha256=generator.bytes(32).hex(),
            samples=samples,
        )
        for number in range(shards)
    ]
    split = SplitEntry.of(entries)
    if kind == "speech":
        shares = np.bincount(draw_lengths(generator, 1_000_000) // LENGTH_BIN) / 1_000_000
        table = np.concatenate(
            [generator.multinomial(samples, shares, size=len(part)).astype("<u4") for part in _parts(shards)]
        )
        file = f"train/{LENGTHS_NAME}"
        split = SplitEntry.of(
            entries,
            lengths=table.sum(axis=0, dtype=int).tolist(),
            lengths_file=file,
            lengths_sha256=write_lengths(open_folder(folder), file, table),
        )
    write_manifest(folder, Manifest(kind=kind, splits={"train": split}))


def _parts(shards: int) -> list[range]:
    return [range(first, min(first + 4096, shards)) for first in range(0, shards, 4096)]


class SimulatedDataset(ShardedDataset):
    """Writes a shard's index when it is first asked for, as its histogram says."""

    def _read_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.splits[self.split].shards[shard]
        path = self.path / entry.index_file
        if not path.exists():
            records = np.zeros(entry.samples, dtype=RECORD)
            records["length"] = np.repeat(np.arange(self.length_table.shape[1]), self.length_table[shard]) * LENGTH_BIN
            keys = [f"speaker{row % 40:04d}/chapter/{shard}-{row:05d}" for row in range(entry.samples)]
            path.write_bytes(ShardIndex(records, keys).to_bytes())
        return super()._read_index(shard)


if __name__ == "__main__":
    main()
