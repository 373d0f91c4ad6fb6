"""What a training step of each quantizer costs, beside vector-quantize-pytorch and the plain matrix product.

`python -m tests.benchmarks.quantizers` prints, for each size, forward + backward + update of each kind: CPU time of all
threads, and peak memory over inputs and weights. The floor is the matrix product of the distances alone, in tiles of
8 MB that nobody reads. Each kind runs in a process of its own, in turn with the floor and with `ema`, so that other
load on the machine meets all three. The optimiser's step of learned codes is left out. Then come the collectives on two
ranks: see tests/benchmarks/ranks.py. With a CUDA device the kinds are timed there too, in fp32 and bf16.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = [(16384, 64, 1024), (65536, 64, 8192), (8192, 256, 8192)]
KINDS: dict[str, dict[str, Any]] = {  # options beside dim and codes
    "ema": {},
    "ksom": {},
    "gd_som": {},
    "ste": {},
    "affine": {},
    "simvq": {},
    "rotation": {},
    "residual": {"levels": 4},
    "fsq": {},  # with levels that multiply to the number of codes
    "lfq": {},
    "gumbel": {},
    "knn_simplex": {},
}
FSQ_LEVELS = {1024: (8, 8, 4, 4), 8192: (8, 8, 8, 4, 4)}
PEERS: dict[str, dict[str, Any]] = {
    "LVQ, straight-through": {"decay": 0.99, "commitment_weight": 0.25, "rotation_trick": False},
    "LVQ, default": {},
}
BYTES_PER_DISTANCE = {"gumbel": 41, "LVQ, straight-through": 25, "LVQ, default": 25, "knn_simplex": 8}
"""Peak memory over tokens × codes, measured at the first size: what would not fit is not tried."""
FLOOR_TILE = {"cpu": 1 << 21, "cuda": 1 << 26}
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}  # threads that wait for work sleep: waiting is no CPU time of the kind's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*KINDS, *PEERS]
    parser.add_argument("--kinds", nargs="*", default=names, help=f"of {', '.join(names)}")
    parser.add_argument("--sizes", nargs="*", default=["x".join(map(str, size)) for size in SIZES], help="TxDxK …")
    parser.add_argument("--repeats", type=int, default=40, help="timed steps of a kind, at most")
    parser.add_argument("--budget", type=float, default=20, help="CPU seconds for the timed steps of a kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=["kinds", "ranks"], help="one part")
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures, as JSON
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_measure(**json.loads(options.one))))
        return
    results: dict[str, Any] = {"kinds": [], "ranks": []}
    if options.only != "ranks":
        results["kinds"] = _all_kinds(options)
    if options.only != "kinds":
        from tests.benchmarks import ranks

        results["ranks"] = ranks.measure_and_print()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _all_kinds(options: argparse.Namespace) -> list[dict[str, Any]]:
    import torch

    from pipeline.quantizers.registry import KINDS as REGISTERED

    devices = [("cpu", "float32")]
    if torch.cuda.is_available():
        devices += [("cuda", "float32"), ("cuda", "bfloat16")]
    else:
        print("No CUDA device: CPU only.")
    results = []
    for device, dtype in devices:
        for text in options.sizes:
            size = tuple(map(int, re.split("[x×]", text)))
            print(f"\n## {' × '.join(map(str, size))}, {dtype} on {device}, {options.threads} threads\n")
            print(HEADER, flush=True)
            for name in options.kinds:
                if name in PEERS and not importlib.util.find_spec("vector_quantize_pytorch"):
                    print(f"| {name} | vector-quantize-pytorch is not installed |")
                elif name not in PEERS and name not in REGISTERED:
                    print(f"| {name} | not in the registry |")
                else:
                    needed = size[0] * size[2] * BYTES_PER_DISTANCE.get(name, 0)
                    if device == "cpu" and needed > 0.9 * _kilobytes("/proc/meminfo", "MemAvailable"):
                        print(f"| {name} | needs {needed / 1e9:.0f} GB, more than is free |")
                        continue
                    wanted = {"name": name, "size": size, "device": device, "dtype": dtype}
                    wanted |= {"repeats": options.repeats, "budget": options.budget}
                    results.append(wanted | _in_a_process(wanted, options.threads))
                    print(_row(results[-1]), flush=True)
    return results


HEADER = """\
| kind | steps | ms, best | median | floor ms, best | × floor, best | median | × ema, median | peak MB |
|---|---|---|---|---|---|---|---|---|"""


def _in_a_process(wanted: dict[str, Any], threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.benchmarks.quantizers", "--one", json.dumps(wanted)]
    environment = ENVIRONMENT | os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _row(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"| {result['name']} | {result['error']} |"
    floor, ema, ours = (result["seconds"][key] for key in ("floor", "ema", "kind"))
    to_floor, to_ema = (statistics.median(a / b for a, b in zip(ours, other, strict=True)) for other in (floor, ema))
    cells = [
        result["name"],
        str(len(ours)),
        *(f"{1000 * value:.1f}" for value in (min(ours), statistics.median(ours), min(floor))),
        *(f"{value:.2f}" for value in (min(ours) / min(floor), to_floor, to_ema)),
        f"{result['peak_bytes'] / 1e6:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


# -- in a process of its own -------------------------------------------------------------------------------------------


def _measure(
    name: str, size: tuple[int, int, int], device: str, dtype: str, repeats: int, budget: float
) -> dict[str, Any]:
    """Peak memory of the kind's first step, then seconds of floor, ema and kind by turns."""
    import torch

    tokens, dim, codes = size
    torch.manual_seed(0)
    latents = torch.randn(tokens, dim).to(device, getattr(torch, dtype)).requires_grad_()
    upstream = torch.randn(tokens, dim).to(latents)
    _step_of("ema", 8, 16)(torch.randn(64, 8, device=device, requires_grad=True), torch.randn(64, 8, device=device))
    step = _step_of(name, dim, codes, device)
    with _Peak(device) as peak:
        first = step_seconds(device, lambda: step(latents, upstream))
    ema = step if name == "ema" else _step_of("ema", dim, codes, device)
    ema(latents, upstream)
    floor = _floor(latents.detach(), codes)
    floor()
    seconds: dict[str, list[float]] = {"floor": [], "ema": [], "kind": []}
    turns: dict[str, Callable[[], object]] = {"floor": floor, "ema": lambda: ema(latents, upstream)}
    if name != "ema":
        turns["kind"] = lambda: step(latents, upstream)
    if first > budget / 2:  # too dear to run again
        seconds["kind"].append(first)
        del turns["kind"]
        repeats = 1
    spent = 0.0
    for _ in range(repeats):
        for key, turn in turns.items():
            seconds[key].append(step_seconds(device, turn))
            spent += seconds[key][-1]
        if spent > budget * (2 if name == "ema" else 3) / 2:
            break
    if name == "ema":
        seconds["kind"] = seconds["ema"]
    return {"seconds": seconds, "peak_bytes": peak.bytes}


def _step_of(name: str, dim: int, codes: int, device: str = "cpu") -> Callable[[Any, Any], None]:
    """One training step: forward, backward, update."""
    import torch
    from torch import autograd

    if name in PEERS:
        from vector_quantize_pytorch import VectorQuantize

        peer = VectorQuantize(dim=dim, codebook_size=codes, **PEERS[name]).to(device)

        def step_of_peer(latents: Any, upstream: Any) -> None:
            latents.grad = None
            vectors, _, loss = peer(latents.unsqueeze(0))
            autograd.backward([vectors, loss.sum()], [upstream.unsqueeze(0), torch.ones_like(loss.sum())])

        return step_of_peer

    from pipeline.codebooks import CodebookSync
    from pipeline.quantizers import build_quantizer

    options = {"kind": name, "dim": dim, "codes": codes, **KINDS[name]}
    if name == "fsq":
        options["levels"] = FSQ_LEVELS.get(codes, (codes,))
    quantizer = build_quantizer(options).to(device)
    sync = CodebookSync(quantizer)

    def step(latents: Any, upstream: Any) -> None:
        latents.grad = None
        quantizer.zero_grad()
        output = quantizer(latents)
        losses = [loss for loss in output.losses.values() if loss.requires_grad]
        autograd.backward([output.vectors, *losses], [upstream, *map(torch.ones_like, losses)])
        sync.step()

    return step


def _floor(latents: Any, codes: int) -> Callable[[], None]:
    import torch

    codebook = torch.randn(codes, latents.shape[1]).to(latents).T
    rows = FLOOR_TILE[latents.device.type] // codes
    tile = latents.new_empty(min(rows, len(latents)), codes)

    def products() -> None:
        for start in range(0, len(latents), rows):
            part = latents[start : start + rows]
            torch.mm(part, codebook, out=tile[: len(part)])

    return products


def step_seconds(device: str, run: Callable[[], object]) -> float:
    """CPU seconds of all threads; on a GPU seconds by the clock."""
    if device == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    import torch

    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


class _Peak:
    """The most memory that its block held over what was there before, in ``bytes``."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> _Peak:
        if self.device == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # free memory that the process holds would hide what is taken
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            self.before = _kilobytes("/proc/self/status", "VmRSS")
        else:
            import torch

            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *problem: object) -> None:
        if self.device == "cpu":
            self.bytes = _kilobytes("/proc/self/status", "VmHWM") - self.before
        else:
            import torch

            self.bytes = torch.cuda.max_memory_allocated() - self.before


def _kilobytes(path: str, field: str) -> int:
    """A field of a file of the kernel's, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path(path).read_text())
    assert found
    return int(found.group(1)) * 1024


if __name__ == "__main__":
    main()
