"""A training step of the speech model beside `transformers` and fairseq2, all of the same size.

`python -m tests.benchmarks.speech` times forward and backward of a micro-batch, masks and negatives included, of

- ours: fairseq2's trunk with our masks, quantizer and objective,
- transformers' Wav2Vec2ForPreTraining with the mask and negative samplers of its own example,
- fairseq2's Wav2Vec2Model, its quantizer without torch.compile,
- the convolutions alone, as ours computes them and as fairseq2 does.

They take turns in one process, so that other load on the machine meets all; CPU seconds of all threads and wall seconds
are given, best and median, over ours. Peak memory is that of a process of its own for each, over what the imports take
in the same process. ``--huge-pages`` has torch ask for huge pages, as our trainer does: for all alike. With a CUDA
device the same is timed there in bf16 with wav2vec 2.0 BASE, in tokens a second and as a share of the device's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = {"model_dim": 256, "layers": 6, "heads": 4, "ffn_dim": 1024, "clips": 4, "seconds": 5.0}
BASE = {"model_dim": 768, "layers": 12, "heads": 12, "ffn_dim": 3072, "clips": 6, "seconds": 15.6}
GROUPS, CODES, CODE_DIM, FINAL_DIM, NEGATIVES = 2, 320, 256, 256, 100
NAMES = ("ours", "transformers", "fairseq2", "our-convolutions", "fairseq2-convolutions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=8, help="timed steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--names", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--huge-pages", action="store_true", help="large tensors in huge pages")
    parser.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _set_environment(options.threads)
    os.environ["THP_MEM_ALLOC_ENABLE"] = str(int(options.huge_pages))
    import torch

    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(_peak_memory(options.child)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = BASE if device == "cuda" else SMALL
    memory = {}
    if not options.no_memory:
        for name in options.names:
            command = [sys.executable, "-m", "tests.benchmarks.speech", "--child", name]
            command += ["--threads", str(options.threads), *["--huge-pages"] * options.huge_pages]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            memory[name] = json.loads(output.splitlines()[-1])
    _print(_take_turns(options.names, sizes, device, options.turns), memory, sizes, device)


def _set_environment(threads: int) -> None:
    """Before torch is imported."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # fairseq2's quantizer would compile a closure with a C++ compiler
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait for work sleep: waiting is no CPU time
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ["HF_HUB_OFFLINE"] = "1"


def _print(seconds: dict[str, list[tuple[float, float]]], memory: dict[str, int], sizes: Any, device: str) -> None:
    frames = sum(_frame_counts(sizes))
    pages = "huge pages" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "small pages"
    print(f"{sizes['clips']} clips of {sizes['seconds']:g} s ({frames} frames), {device}, {sizes}, {pages}\n")
    print("| what | CPU s, best | ours over it | median | ours over it | wall s, best | frames/s | peak memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    columns = {name: [list(column) for column in zip(*values, strict=True)] for name, values in seconds.items()}
    for name, (cpu, wall) in columns.items():
        ratios = [
            f"{f(columns['ours'][0]) / f(cpu):.2f}" if "ours" in columns else "" for f in (min, statistics.median)
        ]
        peak = f"{memory[name] / 1e6:.0f}" if name in memory else ""
        print(
            f"| {name} | {min(cpu):.3f} | {ratios[0]} | {statistics.median(cpu):.3f} | {ratios[1]} | {min(wall):.3f} | "
            f"{frames / min(wall):.0f} | {peak} |"
        )


def _take_turns(names: list[str], sizes: Any, device: str, turns: int) -> dict[str, list[tuple[float, float]]]:
    """(CPU, wall) seconds of each step."""
    import torch

    steps = {name: _build(name, sizes, device) for name in names}
    for step in steps.values():
        step()  # the first allocates, and chooses kernels
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(turns):
        for name, step in steps.items():
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return seconds


def _peak_memory(name: str) -> int:
    """Bytes at the peak of two steps, over those after the imports and before the model."""
    import soundfile  # noqa: F401 - before fairseq2
    import transformers.models.wav2vec2.modeling_wav2vec2  # noqa: F401

    import pipeline.models.speech  # noqa: F401

    before = _resident()
    step = _build(name, SMALL, "cpu")
    step()
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- what is timed -----------------------------------------------------------------------------------------------------


def _build(name: str, sizes: Any, device: str) -> Callable[[], None]:
    """A function that takes one step, in training mode; its parameters are counted against ours."""
    import torch

    torch.manual_seed(0)
    builders = {
        "ours": _ours,
        "transformers": _transformers,
        "fairseq2": _fairseq2,
        "our-convolutions": _our_convolutions,
        "fairseq2-convolutions": _convolutions,
    }
    model, losses = builders[name](sizes, device)
    model.to(device).train()

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = losses()
        loss.backward()

    return step


def _waveforms(sizes: Any) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes["clips"], int(sizes["seconds"] * 16_000), generator=generator)


def _frame_counts(sizes: Any) -> list[int]:
    from pipeline.data.masking import conv_frames

    return [conv_frames(int(sizes["seconds"] * 16_000), _config(sizes).conv_layers)] * sizes["clips"]


def _config(sizes: Any) -> Any:
    from pipeline.models.config import Wav2Vec2Config

    widths = {key: sizes[key] for key in ("model_dim", "layers", "heads", "ffn_dim")}
    return Wav2Vec2Config(**widths, final_dim=FINAL_DIM, layer_drop=0.0)


def _ours(sizes: Any, device: str) -> tuple[Any, Callable[[], Any]]:
    import numpy as np
    import torch

    from pipeline.data import SpeechBatch
    from pipeline.data.masking import draw_negatives, span_mask
    from pipeline.models import build_model
    from pipeline.quantizers.gumbel import GumbelConfig

    config = _config(sizes)
    model = build_model(config, GumbelConfig(dim=CODE_DIM, codes=CODES, groups=GROUPS))
    waveforms, frames = _waveforms(sizes), _frame_counts(sizes)
    generator = np.random.default_rng(0)

    def losses() -> Any:
        masks = [span_mask(count, config.masking, generator) for count in frames]
        drawn = [draw_negatives(int(mask.sum()), NEGATIVES, generator) for mask in masks]
        most = max(map(len, drawn))
        negatives = np.stack([np.pad(rows, ((0, most - len(rows)), (0, 0))) for rows in drawn])
        mask = torch.from_numpy(np.stack(masks))
        batch = SpeechBatch(
            waveforms=waveforms,
            lengths=torch.full((len(frames),), waveforms.shape[1]),
            mask=mask,
            frame_lengths=torch.tensor(frames),
            negatives=torch.from_numpy(negatives),
            keys=[str(number) for number in range(len(frames))],
            step=0,
            number=0,
            targets=int(mask.sum()),
            seconds=waveforms.numel() / 16_000,
        )
        output = model(batch.to(torch.device(device)))
        return sum(output.losses.values()) / batch.targets

    return model, losses


def _transformers(sizes: Any, device: str) -> tuple[Any, Callable[[], Any]]:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices, _sample_negative_indices

    config = Wav2Vec2Config(
        hidden_size=sizes["model_dim"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["ffn_dim"],
        num_codevectors_per_group=CODES,
        num_codevector_groups=GROUPS,
        codevector_dim=CODE_DIM,
        proj_codevector_dim=FINAL_DIM,
        num_negatives=NEGATIVES,
        layerdrop=0.0,
        attn_implementation="sdpa",
    )
    model = Wav2Vec2ForPreTraining(config)
    waveforms, frames = _waveforms(sizes).to(device), _frame_counts(sizes)
    shape = (len(frames), frames[0])

    def losses() -> Any:
        mask = _compute_mask_indices(shape, mask_prob=0.65, mask_length=10)
        negatives = _sample_negative_indices(shape, NEGATIVES, mask_time_indices=mask)
        output = model(
            waveforms,
            mask_time_indices=torch.from_numpy(mask).to(device),
            sampled_negative_indices=torch.from_numpy(negatives).to(device),
        )
        return output.loss / int(mask.sum())

    return model, losses


def _fairseq2(sizes: Any, device: str) -> tuple[Any, Callable[[], Any]]:
    import soundfile  # noqa: F401 - before fairseq2
    from fairseq2.models.wav2vec2 import Wav2Vec2Factory
    from fairseq2.nn import BatchLayout

    from pipeline.models.speech import fairseq2_config

    config = fairseq2_config(_config(sizes))
    config.quantized_dim, config.num_codebooks, config.num_codebook_entries = CODE_DIM, GROUPS, CODES
    config.num_distractors, config.codebook_sampling_temperature = NEGATIVES, (2.0, 0.5, 0.999995)
    model = Wav2Vec2Factory(config).create_model()
    waveforms = _waveforms(sizes).to(device)

    def losses() -> Any:
        loss, output = model(waveforms, BatchLayout.of(waveforms))
        return loss.aggregate / output.num_targets

    return model, losses


def _convolutions(sizes: Any, device: str) -> tuple[Any, Callable[[], Any]]:
    import soundfile  # noqa: F401 - before fairseq2
    from fairseq2.models.wav2vec2 import Wav2Vec2Factory
    from fairseq2.nn import BatchLayout

    from pipeline.models.speech import fairseq2_config

    extractor = Wav2Vec2Factory(fairseq2_config(_config(sizes))).create_encoder_frontend().feature_extractor
    waveforms = _waveforms(sizes).to(device)

    def losses() -> Any:
        features, _ = extractor(waveforms, BatchLayout.of(waveforms))
        return features.float().square().mean()

    return extractor, losses


def _our_convolutions(sizes: Any, device: str) -> tuple[Any, Callable[[], Any]]:
    extractor, losses = _convolutions(sizes, device)
    from pipeline.models.convolutions import compute_by_frames

    compute_by_frames(extractor)
    return extractor, losses


if __name__ == "__main__":
    main()
