"""What the collectives of quantizers cost on two gloo ranks of this machine, one thread each.

`python -m tests.benchmarks.ranks` prints `CodebookSync.step()` for 8 EMA quantizers beside one all-reduce of as many
bytes, and a training step of `knn_simplex` in its global scope beside its local one. Both sides run by turns, from a
barrier, and a turn lasts until the slower rank is through.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.distributed.harness import run_ranks

SYNC_SIZES = [(64, 1024, 400), (64, 8192, 150)]  # dim, codes, repeats
KNN_SIZES = [(4096, 64, 1024, 30)]  # tokens of a rank, dim, codes, repeats
QUANTIZERS = 8
WARM_UP = 3


def main() -> None:
    measure_and_print()


def measure_and_print() -> list[dict[str, Any]]:
    results = []
    print("\n## Two gloo ranks, one thread each\n")
    print("| what | ms, best | median | ratio, best | median |\n|---|---|---|---|---|")
    for dim, codes, repeats in SYNC_SIZES:
        ranks = run_ranks(_sync, 2, dim, codes, repeats, timeout=900)
        what = f"{QUANTIZERS} × {codes} × {dim} ({ranks[0]['bytes'] / 1e6:.1f} MB)"
        results.append(_print(f"one all-reduce, {what}", "CodebookSync.step()", ranks))
    for tokens, dim, codes, repeats in KNN_SIZES:
        ranks = run_ranks(_knn_simplex, 2, tokens, dim, codes, repeats, timeout=900)
        results.append(_print(f"knn_simplex, micro_batch, {tokens} × {dim} × {codes} a rank", "global", ranks))
    return results


def _print(first: str, second: str, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    # a turn's seconds are the slower rank's
    slower = [[max(turn) for turn in zip(*(rank[key] for rank in ranks), strict=True)] for key in ("base", "other")]
    base, other = slower
    ratio = statistics.median(b / a for a, b in zip(base, other, strict=True))
    print(f"| {first} | {1000 * min(base):.2f} | {1000 * statistics.median(base):.2f} | | |")
    times = f"{1000 * min(other):.2f} | {1000 * statistics.median(other):.2f}"
    print(f"| {second} | {times} | {min(other) / min(base):.2f} | {ratio:.2f} |", flush=True)
    return {"base": first, "other": second, "base_seconds": base, "other_seconds": other}


def _by_turns(
    base: Callable[[], object], other: Callable[[], object], repeats: int, before: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    from torch import distributed

    seconds: dict[str, Any] = {"base": [], "other": []}
    for number in range(WARM_UP + repeats):
        for key, run in (("base", base), ("other", other)):
            before()
            distributed.barrier()
            started = time.perf_counter()
            run()
            if number >= WARM_UP:
                seconds[key].append(time.perf_counter() - started)
    return seconds


def _sync(dim: int, codes: int, repeats: int) -> dict[str, Any]:
    import torch
    from torch import distributed, nn

    from pipeline.codebooks import CodebookSync
    from pipeline.quantizers import build_quantizer

    quantizers = [build_quantizer({"kind": "ema", "dim": dim, "codes": codes}) for _ in range(QUANTIZERS)]
    sync = CodebookSync(nn.ModuleList(quantizers))
    flat = torch.zeros(sum(tensor.numel() for quantizer in quantizers for tensor in quantizer.pending()))
    latents = torch.randn(256, dim)

    @torch.no_grad()
    def forward() -> None:
        for quantizer in quantizers:
            quantizer(latents)

    seconds = _by_turns(lambda: distributed.all_reduce(flat), sync.step, repeats, forward)
    return seconds | {"bytes": flat.numel() * 4}


def _knn_simplex(tokens: int, dim: int, codes: int, repeats: int) -> dict[str, Any]:
    import torch

    from pipeline.codebooks import CodebookSync
    from pipeline.quantizers import build_quantizer

    torch.manual_seed(torch.distributed.get_rank())
    latents, upstream = torch.randn(tokens, dim, requires_grad=True), torch.randn(tokens, dim)

    def step_in(scope: str) -> Callable[[], None]:
        options = {"kind": "knn_simplex", "dim": dim, "codes": codes, "neighbours": 2, "scope": scope}
        quantizer = build_quantizer(options)
        CodebookSync(quantizer)  # names and ranks

        def step() -> None:
            latents.grad = None
            quantizer.zero_grad()
            output = quantizer(latents)
            torch.autograd.backward([output.vectors, *output.losses.values()], [upstream, *_ones(output.losses)])
            quantizer.discard_pending()

        return step

    return _by_turns(step_in("micro_batch"), step_in("global"), repeats)


def _ones(losses: dict[str, Any]) -> list[Any]:
    import torch

    return [torch.ones_like(loss) for loss in losses.values()]


if __name__ == "__main__":
    main()
