"""What preparing and loading cost beside the decoding that neither can do without, and beside other people's loaders.

`python -m tests.benchmarks.data --corpus corpus` prints tables over the corpus of `make corpus`. All rows of a table
read the same files and decode them with the same decoder; they take turns, round after round, so that other load on the
machine meets them alike. Samples are those of one epoch, or one tree. CPU time is that of all processes and threads a
row needs; seconds by the clock begin with the first batch, when all workers are up. The last column compares, round by
round, with decoding alone on as many processes as the row has threads or workers.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each row says how many threads or processes it has

import numpy as np
import soundfile
import torch
from PIL import Image

from data_prep import prepare
from data_prep.shard import write_shard
from data_prep.shard_plan import Settings, plan_shards
from data_prep.source import scan
from pipeline.data import (
    BatchConfig,
    DataConfig,
    ImageCollation,
    MaskingConfig,
    SamplingPlan,
    ShardedDataset,
    SpeechCollation,
    build_loader,
)
from pipeline.data.audio import decode_audio
from pipeline.data.image import decode_image, view_image
from pipeline.ray_session import ray_session

WAV2VEC2_LAYERS = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
SHARDS = 16  # of the tree, so that two workers have the same to do
CLIPS = 16  # in a batch of the other loaders
SECONDS = 40.0  # in ours, about as many clips
SPEECH = DataConfig(min_seconds=0.1, max_seconds=60, normalise=False)  # every clip whole, as the others give them
IMAGES = DataConfig(image_size=112, resize=128)
PICTURES = 32  # in a batch


@dataclass
class Row:
    """A contestant, and what it took each round, in milliseconds a sample."""

    name: str
    run: Callable[[], tuple[int, float, float]]  # samples, seconds by the clock, CPU seconds
    rival: str = ""  # the row that this one is compared with
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def turn(self) -> None:
        samples, wall, cpu = self.run()
        self.wall.append(1e3 * wall / samples)
        self.cpu.append(1e3 * cpu / samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="what `make corpus` has made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=["prepare", "speech", "images"], help="some parts")
    parser.add_argument("--samples", type=int, help="of each kind, at most: for a first look")
    arguments = parser.parse_args()
    if not (arguments.corpus / "speech").is_dir():
        parser.error(f"{arguments.corpus} holds no corpus: run `make corpus`, or name its folder with --corpus")
    torch.set_num_threads(1)
    parts = arguments.only or ["prepare", "speech", "images"]
    print(f"`{' '.join(['python -m tests.benchmarks.data', *sys.argv[1:]])}`, {datetime.date.today()}\n")
    print(_versions() + "\n")
    with tempfile.TemporaryDirectory(prefix="tessera-benchmark-") as scratch:
        trees = {kind: Path(scratch, "tree", kind) for kind in ("speech", "tiles")}
        for kind, tree in trees.items():
            _take(arguments.corpus / kind, tree, arguments.samples)
        if "prepare" in parts:
            measure_preparing("speech", trees["speech"], Path(scratch), arguments.rounds)
            measure_preparing("image", trees["tiles"], Path(scratch), arguments.rounds)
        with ray_session():
            prepare_once("speech", trees["speech"], Path(scratch, "speech"))
            prepare_once("image", trees["tiles"], Path(scratch, "images"))
        if "speech" in parts:  # without Ray, whose processes would be counted
            measure_speech(trees["speech"], Path(scratch, "speech"), arguments.rounds)
        if "images" in parts:
            measure_images(trees["tiles"], Path(scratch, "images"), arguments.rounds)


def _versions() -> str:
    packages = ("torch", "torchvision", "soundfile", "miniaudio", "pillow", "numpy", "ray", "webdataset")
    cores = os.cpu_count()
    found = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{cores} cores ({platform.machine()}), Python {platform.python_version()}, {found}"


def _take(source: Path, tree: Path, samples: int | None) -> None:
    """A tree of links to the files of ``source``, or to some of them."""
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".flac", ".jpg", ".jpeg"))
    for path in random.Random(0).sample(files, min(samples or len(files), len(files))):
        link = tree / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())


def table(title: str, rows: Sequence[Row], rounds: int) -> None:
    """Let the rows take turns, and print what they took."""
    for _ in range(rounds):
        for row in rows:
            row.turn()
    found = {row.name: row for row in rows}
    print(f"### {title}\n")
    print("| | samples/s best | median | CPU ms/sample best | median | of the limit by clock | by CPU |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        rival = found.get(row.rival)
        shares = (
            [
                f"{statistics.median(theirs / ours for ours, theirs in zip(mine, limit, strict=True)):.2f}"
                for mine, limit in ((row.wall, rival.wall), (row.cpu, rival.cpu))
            ]
            if rival
            else []
        )
        cells = [
            row.name,
            f"{1e3 / min(row.wall):,.0f}",
            f"{1e3 / statistics.median(row.wall):,.0f}",
            f"{min(row.cpu):.3f}",
            f"{statistics.median(row.cpu):.3f}",
            *(shares or ["", ""]),
        ]
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


# ---- preparing


def measure_preparing(kind: str, tree: Path, scratch: Path, rounds: int) -> None:
    """The bare loop, ours without Ray, and Ray with 1 and 2 workers, which are up before the clock starts."""
    out = scratch / "prepared"
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    settings = Settings(kind, size // SHARDS, (("train", 1.0),), "file", 0)
    began = time.perf_counter()
    with ray_session():
        started = time.perf_counter() - began

        def bare() -> int:
            """Read, decode, copy: what no preparation that checks its files can do without."""
            decode = _decode_sound if kind == "speech" else _decode_picture
            tasks = plan_shards(scan(kind, tree, leave_out=out).files, settings)
            for task in tasks:
                with (out / f"{task.number}").open("wb") as file:
                    for source in task.files:
                        content = source.read()
                        decode(content)
                        file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            return sum(len(task.files) for task in tasks)

        def plain() -> int:
            tasks = plan_shards(scan(kind, tree, leave_out=out).files, settings)
            workspace = out / "workspace"
            workspace.mkdir()
            records = [write_shard(out, workspace, task, settings, {}, "plan") for task in tasks]
            return sum(record.entry.samples for record in records if record.entry is not None)

        def with_ray(workers: int) -> int:
            options: dict[str, Any] = {"progress": lambda _: None, "splits": "train", "workers": workers}
            return prepare(kind, tree, out / "set", shard_bytes=size // SHARDS, **options).samples

        def timed(run: Callable[[], int], used: Callable[[], float]) -> Callable[[], tuple[int, float, float]]:
            def turn() -> tuple[int, float, float]:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                os.sync()
                began, before = time.perf_counter(), used()
                samples = run()
                return samples, time.perf_counter() - began, used() - before

            return turn

        rows = [
            Row("bare loop: read, decode, copy", timed(bare, time.process_time)),
            Row("ours without Ray", timed(plain, time.process_time), "bare loop: read, decode, copy"),
            Row("ours, 1 Ray worker", timed(lambda: with_ray(1), _cpu_seconds), "bare loop: read, decode, copy"),
            Row("ours, 2 Ray workers", timed(lambda: with_ray(2), _cpu_seconds), "ours, 1 Ray worker"),
        ]
        out.mkdir(exist_ok=True)
        with_ray(2)  # the workers are up and have loaded their decoders
        table(f"Preparing: {kind}, {size / 1e6:,.0f} MB into {SHARDS} shards, every file decoded", rows, rounds)
    print(f"Ray's own start: {started:.1f} s. The last row is compared with 1 worker.\n", flush=True)
    shutil.rmtree(out)


def _decode_sound(content: bytes) -> None:
    soundfile.read(io.BytesIO(content), dtype="int16")


def _decode_picture(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        image.load()


def _cpu_seconds() -> float:
    """CPU seconds of this process and of all that it has started, Ray's included."""
    ticks = os.sysconf("SC_CLK_TCK")
    used: dict[int, tuple[int, float]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        used[int(path.parent.name)] = int(fields[1]), sum(map(int, fields[11:15])) / ticks
    total, family = 0.0, {os.getpid()}
    while family:
        total += sum(used[process][1] for process in family if process in used)
        family = {process for process, (parent, _) in used.items() if parent in family}
    return total


# ---- loading


def prepare_once(kind: str, tree: Path, out: Path) -> None:
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    prepare(kind, tree, out, shard_bytes=size // SHARDS, splits="train", progress=lambda _: None)  # type: ignore[arg-type]


def loading(batches: Callable[[], Iterator[int]]) -> Callable[[], tuple[int, float, float]]:
    """Times an epoch of batches, told by the number of their samples, from the arrival of the first on."""

    def turn() -> tuple[int, float, float]:
        before = _cpu_seconds()
        stream = batches()
        first = next(stream)
        began = time.perf_counter()
        samples = sum(stream)
        wall = time.perf_counter() - began
        cpu = _cpu_seconds() - before  # the stream is exhausted and its workers have ended: their time is ours now
        return samples, wall, cpu * samples / (first + samples)

    return turn


def decoding(
    contents: list[bytes], decode: Callable[[bytes], Any], processes: int
) -> Callable[[], tuple[int, float, float]]:
    """Decodes bytes that lie in memory and drops what comes out, on so many processes, of which this is one."""

    def decode_part(part: int) -> None:
        for content in contents[part::processes]:
            decode(content)

    def turn() -> tuple[int, float, float]:
        before, began = _cpu_seconds(), time.perf_counter()
        children = []
        for part in range(1, processes):
            child = os.fork()
            if not child:
                decode_part(part)
                os._exit(0)
            children.append(child)
        decode_part(0)
        for child in children:
            os.waitpid(child, 0)
        return len(contents), time.perf_counter() - began, _cpu_seconds() - before

    return turn


def measure_speech(tree: Path, prepared: Path, rounds: int) -> None:
    dataset = ShardedDataset(prepared)
    clips = _Clips(SpeechCollation(SPEECH, MaskingConfig(), WAV2VEC2_LAYERS, seed=0))
    everything = SpeechCollation(
        SPEECH.model_copy(update={"normalise": True}), MaskingConfig(), WAV2VEC2_LAYERS, seed=0
    )
    contents = [dataset.read(index).content for index in range(len(dataset))]
    rows = []
    for processes in (1, 2):
        limit = f"limit: decoding alone, {processes} processes"
        batch = BatchConfig(micro_batches=1, seconds=SECONDS)
        rows += [
            Row(limit, decoding(contents, decode_audio, processes)),
            Row(
                f"ours, {processes} threads: clips, padded",
                loading(_ours(dataset, clips, batch, SPEECH, processes)),
                limit,
            ),
            Row(
                f"ours, {processes} threads: and normalised, masks, negatives",
                loading(_ours(dataset, everything, batch, SPEECH, processes)),
                limit,
            ),
        ]
    rows += _others(tree, prepared, "flac", _decode_clip, _pad, CLIPS, "limit: decoding alone, {} processes")
    hours = sum(dataset.length(index) for index in range(len(dataset))) / 16_000 / 3600
    table(f"Loading: {len(dataset)} clips, {hours:.2f} h of speech", rows, rounds)


def measure_images(tree: Path, prepared: Path, rounds: int) -> None:
    dataset = ShardedDataset(prepared)
    collation = ImageCollation(IMAGES, seed=0)
    contents = [dataset.read(index).content for index in range(len(dataset))]
    rows = []
    for processes in (1, 2):
        limit = f"limit: decoding and resizing alone, {processes} processes"
        batch = BatchConfig(micro_batches=1, samples=PICTURES)
        rows += [
            Row(limit, decoding(contents, _decode_image, processes)),
            Row(f"ours, {processes} threads", loading(_ours(dataset, collation, batch, IMAGES, processes)), limit),
        ]
    rows += _others(
        tree, prepared, "jpg", _decode_image, torch.stack, PICTURES, "limit: decoding and resizing alone, {} processes"
    )
    table(f"Loading: {len(dataset)} images of 256 × 256, as {IMAGES.image_size} × {IMAGES.image_size}", rows, rounds)


class _Clips:
    """Clips in a padded tensor and no more, as the other loaders give them."""

    def __init__(self, collation: SpeechCollation) -> None:
        self.collation = collation

    def __call__(self, references: Sequence[Any], dataset: Any, step: int = 0, number: int = 0) -> Any:
        members = [dataset.sources[reference.source].read(reference.index) for reference in references]
        return self.collation.clips(references, members)


def _ours(
    dataset: ShardedDataset, collation: Any, batch: BatchConfig, data: DataConfig, threads: int
) -> Callable[[], Iterator[int]]:
    def batches() -> Iterator[int]:
        plan = SamplingPlan(dataset, batch, data, seed=0)
        seen = 0
        with build_loader(dataset, plan, collation, threads=threads, prefetch=2 * threads) as loader:
            for (micro_batch,) in loader:
                samples = len(micro_batch[1]) if isinstance(micro_batch, tuple) else len(micro_batch.keys)
                seen += samples
                yield samples
                if seen >= len(dataset):
                    return

    return batches


def _others(
    tree: Path, prepared: Path, suffix: str, decode: Callable[[bytes], Any], collate: Any, batch: int, limit: str
) -> list[Row]:
    """webdataset's own loader over our shards, and a folder's files through torch's DataLoader."""
    import webdataset
    from torch.utils.data import DataLoader

    urls = [str(path) for path in sorted(prepared.glob("train/*.tar"))]
    files = sorted(path for path in tree.rglob("*") if path.is_file())

    def web(workers: int) -> Iterator[int]:
        samples = webdataset.WebDataset(urls, shardshuffle=False).to_tuple(suffix).map_tuple(decode)
        batches = samples.batched(batch, collation_fn=lambda found: collate([each for (each,) in found]))
        for found in webdataset.WebLoader(batches, batch_size=None, num_workers=workers):
            yield len(found)

    def folder(workers: int) -> Iterator[int]:
        dataset = _Folder(files, decode)
        for found in DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers, collate_fn=collate):
            yield len(found)

    rows = []
    for workers in (0, 1, 2):
        rival = limit.format(max(1, workers))
        rows += [
            Row(f"webdataset's WebLoader, {workers} workers", loading(lambda n=workers: web(n)), rival),  # type: ignore[misc]
            Row(f"folder and DataLoader, {workers} workers", loading(lambda n=workers: folder(n)), rival),  # type: ignore[misc]
        ]
    return rows


class _Folder(torch.utils.data.Dataset[Any]):
    """Files of a folder, each read and decoded when asked for."""

    def __init__(self, files: list[Path], decode: Callable[[bytes], Any]) -> None:
        self.files, self.decode = files, decode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return self.decode(self.files[index].read_bytes())


def _decode_clip(content: bytes) -> torch.Tensor:
    return torch.from_numpy(decode_audio(content))


def _pad(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    padded = torch.zeros(len(clips), max(map(len, clips)))
    for row, clip in zip(padded, clips, strict=True):
        row[: len(clip)] = clip
    return padded


def _decode_image(content: bytes) -> torch.Tensor:
    return view_image(decode_image(content), IMAGES, np.random.default_rng(0))


if __name__ == "__main__":
    main()
