"""What quantizing adds to a training step of an image autoencoder, beside the same step without it.

`python -m tests.benchmarks.images` times forward, backward, AdamW's step and the codebook's update of the CIFAR-10 net
of the KSOM paper (32 × 32 pixels, 8 × 8 latents of 64 features, 512 codes) with

- each kind of quantizer, over the same net with `identity`,
- vector-quantize-pytorch's layer in the same net,
- `identity` and as many products of tokens × codes × features as mixtures of codes (`knn_simplex`) and a softmax over
  codes (`gumbel`) can't do without, forward and backward: the least that these kinds can add,
- `identity` and `ema` with their residual blocks compiled (`engine.compile`).

They take turns in one process, so that other load on the machine meets all alike. CPU seconds are those of all threads;
ratios are medians of a turn's own ratios. What the loader costs beside decoding is `python -m tests.benchmarks.data`.
With a CUDA device the same is timed there, by the clock.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from typing import Any

from tests.benchmarks.quantizers import step_seconds

KINDS = ("ema", "ksom", "gd_som", "ste", "affine", "knn_simplex", "gumbel", "simvq", "rotation", "fsq")
OPTIONS: dict[str, dict[str, Any]] = {"fsq": {"levels": (8, 8, 8)}, "gumbel": {"groups": 1}}
PEER = "LVQ, EMA"
COMPILED = ", compiled"
PRODUCTS = {"identity and 4 products": 4, "identity and 6 products": 6}
"""4: logits, and the gradients of p, latents and weights; 6: mixtures and the gradient of codes besides."""
BASE = "identity"
CODES = 512


def main() -> None:
    names = [*KINDS, PEER, *PRODUCTS, BASE + COMPILED, "ema" + COMPILED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10, help="timed steps of each")
    parser.add_argument("--images", type=int, default=64, help="in a micro-batch")
    parser.add_argument("--side", type=int, default=32, help="of an image, in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--names", nargs="*", default=names, choices=names)
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "passive"  # threads that wait for work sleep: waiting is no CPU time of a step's
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = {name: _build(name, options.images, options.side, device) for name in [BASE, *options.names]}
    for step in steps.values():
        step()  # the first allocates, and chooses kernels
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.turns):
        for name, step in steps.items():
            seconds[name].append(step_seconds(device, step))
    print(f"{options.images} images of {options.side} × {options.side}, {device}, {options.turns} turns\n")
    print(f"| quantizer | {'s' if device == 'cuda' else 'CPU s'} a step, best | over {BASE}, median |\n|---|---|---|")
    for name, of_name in seconds.items():
        ratios = [one / base for one, base in zip(of_name, seconds[BASE], strict=True)]
        print(f"| {name} | {min(of_name):.4f} | {statistics.median(ratios):.3f} |")


def _build(name: str, images: int, side: int, device: str) -> Callable[[], None]:
    """A function that takes one step of the whole net."""
    import torch

    from pipeline.codebooks import CodebookSync
    from pipeline.data import ImageBatch
    from pipeline.models import build_model
    from pipeline.models.config import AutoencoderConfig
    from pipeline.quantizers import build_quantizer
    from pipeline.training.config import OptimizerConfig
    from pipeline.training.optimizer import build_optimizer

    torch.manual_seed(0)
    kind = BASE if name in PRODUCTS else name.removesuffix(COMPILED)
    config = AutoencoderConfig()
    base = {"kind": BASE} if kind in (BASE, PEER) else {"kind": kind, "codes": CODES} | OPTIONS.get(kind, {})
    if kind == "fsq":
        base.pop("codes")
    model = build_model(config, build_quantizer(base | {"dim": config.latent_dim}).config)
    if kind == PEER:
        model.quantizer = _peer(config.latent_dim)
    pixels = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    model.to(device).train()
    if name.endswith(COMPILED):
        for block in model.blocks:
            block.compile()
    batch = ImageBatch(
        pixels=pixels,
        labels=torch.full((images,), -1),
        keys=[str(number) for number in range(images)],
        step=0,
        number=0,
        targets=pixels.numel(),
    ).to(device)
    optimizer = build_optimizer(model, OptimizerConfig())
    sync = None if kind == PEER else CodebookSync(model, optimizer=optimizer)
    tokens = images * (side // model.shrinkage) ** 2
    left = torch.rand(tokens, config.latent_dim, device=device)
    right = torch.rand(config.latent_dim, CODES, device=device)
    product = torch.empty(tokens, CODES, device=device)

    def step() -> None:
        optimizer.zero_grad()
        output = model(batch)
        (sum(output.losses.values()) / batch.targets).backward()
        optimizer.step()
        if sync is not None:
            sync.step()
        for _ in range(PRODUCTS.get(name, 0)):
            torch.mm(left, right, out=product)

    return step


def _peer(dim: int) -> Any:
    """vector-quantize-pytorch's EMA-VQ, which updates its codes in its forward, behind the interface of ours."""
    import torch
    from torch import nn
    from vector_quantize_pytorch import VectorQuantize

    from pipeline.quantizers.base import QuantizerOutput

    class Peer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = VectorQuantize(
                dim=dim, codebook_size=CODES, decay=0.99, commitment_weight=0.25, rotation_trick=False
            )

        def forward(self, latents: torch.Tensor) -> QuantizerOutput:
            vectors, codes, loss = self.layer(latents.flatten(1, 2))
            usage = torch.zeros(1, CODES)
            return QuantizerOutput(
                vectors.view(latents.shape), codes.view(*latents.shape[:-1], 1), {"commitment": loss.sum()}, usage, {}
            )

    return Peer()


if __name__ == "__main__":
    main()
