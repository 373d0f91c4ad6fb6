"""The `tessera` command: each subcommand parses its arguments and calls the part that does the work.

In: the command line. Out: an exit code: 0 done, 1 the work found something wrong, 2 the request can't be carried out.
Imports nothing but Typer: every library loads inside the command that needs it, so `tessera --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class InOrderOfUse(TyperGroup):
    """Lists `prepare` after `demo`, before what reads its shards: Typer puts groups last."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name for name in super().list_commands(ctx) if name != "prepare"]
        return [*names[:1], "prepare", *names[1:]]


app = typer.Typer(
    name="tessera",
    cls=InOrderOfUse,
    help="Pretrain discrete representations of speech and images, the same on any number of machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
prepare_app = typer.Typer(no_args_is_help=True, help="Make shards and a manifest from a raw tree, with Ray.")
app.add_typer(prepare_app, name="prepare")

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]…", help="Dotted overrides, such as quantizer.kind=ksom.")
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe file, or the name of a bundled recipe such as speech/wav2vec2_tiny or "
        "image/autoencoder_tiny_ksom."
    ),
]


RawWeights = Annotated[
    bool, typer.Option("--raw-weights", help="The weights as trained, where the run has averaged them (weight_ema).")
]


class OnBad(StrEnum):
    quarantine = "quarantine"
    fail = "fail"


class Check(StrEnum):
    full = "full"
    header = "header"


class ImageFormat(StrEnum):
    keep = "keep"
    jpeg = "jpeg"


class Colour(StrEnum):
    keep = "keep"
    rgb = "rgb"
    grey = "grey"


class PictureFormat(StrEnum):
    png = "png"
    jpeg = "jpeg"


class Backend(StrEnum):
    local = "local"
    ray = "ray"
    slurm = "slurm"
    hostfile = "hostfile"
    kubernetes = "kubernetes"


class Device(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


class ExportFormat(StrEnum):
    huggingface = "huggingface"
    fairseq2 = "fairseq2"
    safetensors = "safetensors"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; it is emptied first.")] = Path(
        "demo"
    ),
    samples: Annotated[
        Path | None, typer.Option(help="Folder with speech/ and images/; by default the bundled sample.")
    ] = None,
) -> None:
    """The whole main job on real speech and real photographs, on this machine, in under 10 minutes."""
    from launch.demo import run_demo

    raise typer.Exit(run_demo(out, samples))


def _prepare(kind: str, source: str, out: str, **settings: Any) -> None:
    from data_prep import PreparationStopped, prepare

    plain = {name: value.value if isinstance(value, StrEnum) else value for name, value in settings.items()}
    try:
        summary = prepare(kind, source, out, **plain)  # type: ignore[arg-type]
    except PreparationStopped as stop:
        typer.echo(str(stop), err=True)
        raise typer.Exit(130) from stop  # what shells say of Ctrl-C
    typer.echo(str(summary))


ShardBytes = Annotated[int, typer.Option(min=1, help="Wanted size of a shard in bytes.")]
Split = Annotated[str, typer.Option(help="Splits and their shares, such as train=0.95,validation=0.05.")]
OnBadOption = Annotated[OnBad, typer.Option(help="What to do with a file that can't be read.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Shards written at a time; by default one a core.")]
RayAddress = Annotated[
    str | None, typer.Option(help="Address of a running Ray cluster, such as auto; by default this machine.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the assignment of samples to shards.")]
CheckOption = Annotated[
    Check, typer.Option(help="Decode every file, or read only the headers of those that are stored as they came.")
]
Source = Annotated[
    str,
    typer.Argument(help="A folder, searched in depth, a .tar, or a text file with a path a line; or the URL of one."),
]
Out = Annotated[
    str, typer.Argument(help="Folder or URL of the data set; the same command again finishes an interrupted one.")
]


@prepare_app.command("speech")
def prepare_speech(
    source: Source,
    out: Out,
    shard_bytes: ShardBytes = 256 * 2**20,
    split: Split = "train=0.98,validation=0.02",
    on_bad: OnBadOption = OnBad.quarantine,
    workers: Workers = None,
    ray_address: RayAddress = None,
    seed: Seed = 0,
    check: CheckOption = Check.full,
    split_by_speaker: Annotated[bool, typer.Option(help="Keep a speaker (folder) within one split.")] = False,
    max_seconds: Annotated[
        float | None, typer.Option(min=1, help="Cut longer recordings into pieces, at quiet places.")
    ] = None,
) -> None:
    """FLAC, WAV, OGG, Opus, MP3 → WebDataset shards at 16 kHz."""
    _prepare(
        "speech",
        source,
        out,
        shard_bytes=shard_bytes,
        splits=split,
        on_bad=on_bad,
        workers=workers,
        ray_address=ray_address,
        seed=seed,
        check=check,
        split_by="label" if split_by_speaker else "file",
        max_seconds=max_seconds,
    )


@prepare_app.command("images")
def prepare_images(
    source: Source,
    out: Out,
    shard_bytes: ShardBytes = 256 * 2**20,
    split: Split = "train=0.98,validation=0.02",
    on_bad: OnBadOption = OnBad.quarantine,
    workers: Workers = None,
    ray_address: RayAddress = None,
    seed: Seed = 0,
    check: CheckOption = Check.full,
    image_size: Annotated[int | None, typer.Option(min=8, help="Shrink larger images to this shorter side.")] = None,
    image_format: Annotated[ImageFormat, typer.Option(help="Store every image as JPEG.")] = ImageFormat.keep,
    jpeg_quality: Annotated[int, typer.Option(min=1, max=100, help="Of images that are encoded anew.")] = 95,
    colour: Annotated[Colour, typer.Option(help="Store every image in this colour mode.")] = Colour.keep,
) -> None:
    """JPEG, PNG, WebP, BMP, GIF, TIFF, JPEG 2000 → WebDataset shards; folders are classes."""
    _prepare(
        "image",
        source,
        out,
        shard_bytes=shard_bytes,
        splits=split,
        on_bad=on_bad,
        workers=workers,
        ray_address=ray_address,
        seed=seed,
        check=check,
        image_size=image_size,
        image_format=image_format,
        jpeg_quality=jpeg_quality,
        colour=colour,
    )


@app.command()
def verify(dataset: Annotated[str, typer.Argument(help="Data set folder, or its URL.")]) -> None:
    """Check every shard of a data set against its manifest; exit 1 and a list when something is off."""
    import time

    from data_prep import verify as find_problems
    from data_prep.progress import VerificationProgress, console_progress
    from pipeline.data.storage import is_remote

    if not is_remote(dataset) and not Path(dataset).is_dir():
        raise FileNotFoundError(f"{dataset} does not exist: give the folder that `tessera prepare` made")
    began = time.monotonic()
    with console_progress("verifying") as show:
        problems = find_problems(
            dataset, progress=lambda done, shards: show(VerificationProgress(done, shards, time.monotonic() - began))
        )
    for problem in problems:
        typer.echo(str(problem), err=True)
    if problems:
        typer.echo("remove damaged shards and repeat their preparation: it makes those again, byte for byte", err=True)
        raise typer.Exit(1)
    typer.echo(f"{dataset}: every shard is as its manifest says")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks the memory and the command are for.")] = 1,
    rate: Annotated[
        float | None,
        typer.Option(
            min=1e-9, help="Seconds of speech, or images, a second on all ranks: a log's audio_ or samples_per_second."
        ),
    ] = None,
    device: Annotated[Device, typer.Option(help="What ranks run on: kernels of a GPU keep other things.")] = Device.gpu,
) -> None:
    """What a run would need: parameters, memory a rank, samples, steps, time, padding; nothing is trained."""
    from launch.plan import print_plan

    print_plan(recipe, overrides or [], ranks, rate, device.value)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run: Annotated[Path, typer.Option(help="Run folder; training starts where it left off.")] = ...,  # type: ignore[assignment]
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine; by default one a GPU, or 1.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of a few steps of each rank into RUN/profile.")
    ] = False,
) -> None:
    """Train on this machine."""
    from launch.start import start_locally

    raise typer.Exit(start_locally(recipe, overrides or [], run, ranks, profile=profile))


@app.command()
def launch(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    on: Annotated[Backend, typer.Option(help="What starts the ranks.")] = Backend.local,
    run: Annotated[Path, typer.Option(help="Run folder, on a file system that all nodes see.")] = ...,  # type: ignore[assignment]
    nodes: Annotated[int, typer.Option(min=1, help="Machines to train on.")] = 1,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Processes on each, such as one a GPU.")] = 1,
    gpus: Annotated[bool, typer.Option(help="slurm, kubernetes: ask for a GPU a rank; ray: use them if there.")] = True,
    failures: Annotated[int, typer.Option(min=0, help="ray: dead worker groups to replace before giving up.")] = 3,
    ray_address: RayAddress = None,
    hostfile: Annotated[Path | None, typer.Option(help="hostfile: one `host slots=N` a line.")] = None,
    image: Annotated[str, typer.Option(help="kubernetes: container image with Tessera in it.")] = "tessera:latest",
    time_limit: Annotated[str, typer.Option(help="slurm: time limit of the job, as sbatch takes it.")] = "24:00:00",
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="slurm: one more option of sbatch, such as partition=long; repeat it."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and start nothing.")] = False,
) -> None:
    """Train on a cluster."""
    from launch.start import Launch, start

    asked = Launch(
        backend=on.value,
        recipe_name=recipe,
        overrides=overrides or [],
        run=run,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus=gpus,
        failures=failures,
        ray_address=ray_address,
        hostfile=hostfile,
        image=image,
        time_limit=time_limit,
        sbatch_options=sbatch or [],
        dry_run=dry_run,
    )
    raise typer.Exit(start(asked))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[
        str | None, typer.Option(help="Data set folder, or its URL; by default the one of the recipe.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="By default validation if there is one, else train.")] = None,
    downstream: Annotated[
        bool, typer.Option(help="Speech: also probe frozen features beside log-mel and the untrained encoder.")
    ] = False,
    layer: Annotated[
        int | None, typer.Option(min=1, help="Transformer layer that --downstream probes; by default the middle one.")
    ] = None,
    inception_weights: Annotated[
        Path | None, typer.Option(help="Images: Inception v3 for rFID, as pytorch-fid or torchvision publish it.")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="Images: VGG16 or AlexNet for LPIPS, as torchvision publishes them.")
    ] = None,
    lpips_heads: Annotated[
        Path | None, typer.Option(help="LPIPS's weights of the channels; by default those that come with torchmetrics.")
    ] = None,
    raw_weights: RawWeights = False,
) -> None:
    """Metrics over a whole split, as a table and RUN/metrics.json."""
    from rich.console import Console

    from pipeline.evaluation import downstream_table, metrics_table, networks_told
    from pipeline.evaluation import evaluate as evaluate_run
    from pipeline.evaluation.distances import NetworkFiles
    from pipeline.evaluation.kept import dropped_measures
    from pipeline.evaluation.metrics import read_metrics

    if layer is not None and not downstream:
        raise typer.BadParameter("--layer says what --downstream probes: give both, or neither")
    before = read_metrics(run) or {}
    files = NetworkFiles(inception_weights, lpips_weights, lpips_heads)
    given = files if files != NetworkFiles() else None
    metrics = evaluate_run(
        run, data=data, split=split, downstream=downstream, layer=layer, files=given, raw=raw_weights
    )
    console = Console()
    console.print(metrics_table(metrics))
    for line in networks_told(metrics):
        typer.echo(line)
    if "downstream" in metrics:
        console.print(downstream_table(metrics))
    for line in dropped_measures(before, metrics):
        typer.echo(line)


@app.command()
def tokenize(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    dataset: Annotated[str, typer.Argument(help="Data set folder, or its URL.")],
    out: Annotated[Path, typer.Argument(help="Folder for the shards of codes.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="One row a run of equal speech frames, not one a frame.")
    ] = False,
    raw_weights: RawWeights = False,
    ray_address: RayAddress = None,
) -> None:
    """A data set's codes as WebDataset shards, through Ray; of speech with frame rate, durations and start times."""
    from pipeline.export import tokenize as tokenize_dataset
    from pipeline.ray_session import ray_session

    with ray_session(ray_address):
        summary = tokenize_dataset(run, dataset, out, merge=merge, raw=raw_weights)
    typer.echo(str(summary))


@app.command()
def decode(
    run: Annotated[Path, typer.Argument(help="Run folder that made the tokens.")],
    tokens: Annotated[Path, typer.Argument(help="Folder of image tokens that `tessera tokenize` made.")],
    out: Annotated[Path, typer.Argument(help="New folder for the images, OUT/SPLIT/KEY.png.")],
    format: Annotated[PictureFormat, typer.Option("--format", help="Of the images.")] = PictureFormat.png,
    ray_address: RayAddress = None,
) -> None:
    """Image tokens as images again, through Ray."""
    from pipeline.export import decode as decode_tokens
    from pipeline.ray_session import ray_session

    with ray_session(ray_address):
        summary = decode_tokens(run, tokens, out, form=format.value)
    typer.echo(str(summary))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for the weights.")],
    format: Annotated[
        ExportFormat | None,
        typer.Option("--format", help="Whose format; by default huggingface for speech, safetensors for images."),
    ] = None,
    raw_weights: RawWeights = False,
) -> None:
    """Weights that others can load."""
    from pipeline.export import export as export_run

    typer.echo(f"wrote {export_run(run, out, format=format.value if format else None, raw=raw_weights)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[Path | None, typer.Option(help="HTML file; by default RUN/report.html of the first run.")] = None,
) -> None:
    """One self-contained HTML file with the figures."""
    from pipeline.evaluation import write_report

    typer.echo(f"wrote {write_report(runs, out)}")


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="A run, a checkpoint, a shard or a data set.")]) -> None:
    """What a run, checkpoint, shard or data set holds."""
    from launch.inspect import print_contents

    print_contents(path)


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at all nodes of a Ray cluster.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(help="cluster: its address; by default RAY_ADDRESS, or the one that runs here.")
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where runs will be written: looked at for room.")] = Path(),
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="cluster: ranks that exchange; by default one a GPU, or 2.")
    ] = None,
) -> None:
    """What this machine or cluster has, what is missing, and what to do about it."""
    from launch.doctor import diagnose, print_findings

    if cluster:
        from launch.cluster_check import check_cluster

        raise typer.Exit(print_findings(check_cluster(ray_address, str(folder.absolute()), ranks_per_node)))
    raise typer.Exit(print_findings(diagnose([folder])))


def main() -> None:
    """Entry point: an error that names its cause is printed without a traceback, exit code 2."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        # A library's RuntimeError needs its traceback; ours, wrong values and the file system's errors say what is
        # wrong.
        ours = type(error).__module__.partition(".")[0] in ("pipeline", "recipes", "data_prep", "launch")
        if os.environ.get("TESSERA_TRACEBACK") or not (ours or isinstance(error, ValueError | OSError)):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
