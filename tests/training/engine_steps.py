"""Takes steps of tiny models through the real engine, as the loop does, and brings back all that they changed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.collation import ImageBatch
from tests.models import speech

BETA = 0.9
"""Adam's first: after one step its first moment is the gradient times 1 - BETA."""
STEP_MICRO_BATCHES = 4
SPEECH_LENGTHS = [(9_000, 9_000), (9_000,), (9_000, 9_000, 9_000), (9_000,)]
"""Of one length, as padding changes what group norm sees; the numbers of clips differ."""
IMAGES = [3, 1, 2, 4]
_GUMBEL = {"kind": "gumbel", "codes": 8, "groups": 2, "dim": 12}
SPEECH_QUANTIZERS: dict[str, dict[str, Any]] = {
    "speech": {"kind": "ste", "codes": 16},
    "gumbel": _GUMBEL,
    "gumbel, joined": _GUMBEL | {"scope": "global"},
}


def build(kind: str, **changes: Any) -> nn.Module:
    """A model of ``kind``, "image", "sqvae", "vit_som", "classifier" or one of :data:`SPEECH_QUANTIZERS`, with
    weights from a seed; its codebook is learned by gradient."""
    from pipeline.models import build_model
    from pipeline.models.config import AutoencoderConfig, ClassifierConfig, SQVAEConfig, ViTSOMConfig
    from pipeline.quantizers.som import SOMConfig
    from pipeline.quantizers.ste import STEConfig

    if kind in SPEECH_QUANTIZERS:
        return speech.tiny_model(SPEECH_QUANTIZERS[kind], **changes)
    torch.manual_seed(0)
    if kind == "sqvae":
        return build_model(SQVAEConfig(latent_dim=8, residual_layers=1), STEConfig(codes=16)).train()
    if kind == "classifier":
        sizes = {"patch": 4, "width": 8, "heads": 2, "depth": 2, "quantize_after": 1, **changes}
        return build_model(ClassifierConfig(architecture="vit", classes=7, **sizes), STEConfig(codes=16)).train()
    if kind == "vit_som":
        sizes = {"image_size": 16, "patch": 4, "width": 8, "depth": 2, **changes}
        model = build_model(ViTSOMConfig(**sizes), SOMConfig(codes=6, steps=10, weight=0.5)).train()
        model.quantizer.updates.fill_(5)  # the map's loss has its full weight
        return model
    sizes = {"channels": 8, "residual_channels": 6, "latent_dim": 8, "downsampling": 1, **changes}
    return build_model(AutoencoderConfig(**sizes), STEConfig(codes=16)).train()


def micro_batch(kind: str, step: int, number: int) -> Any:
    """Micro-batch ``number`` of ``step``."""
    if kind in SPEECH_QUANTIZERS:
        return speech.make_batch(speech.tiny_config(), SPEECH_LENGTHS[number], seed=100 * step + number)
    generator = torch.Generator().manual_seed(100 * step + number)
    batch = image_batch(torch.rand(IMAGES[number], 3, 16, 16, generator=generator))
    if kind == "classifier":
        batch = replace(batch, labels=torch.randint(7, (len(batch.keys),), generator=generator))
    return batch


def image_batch(pixels: Tensor) -> ImageBatch:
    keys = [f"image-{place}" for place in range(len(pixels))]
    labels = torch.full((len(pixels),), -1)
    return ImageBatch(pixels=pixels, labels=labels, keys=keys, step=0, number=0, targets=pixels.numel())


def take_steps(kind: str, engine_options: dict[str, Any], steps: int, poison: Sequence[int] = (), **changes: Any):
    """Called on each rank; ``poison`` steps have a loss that no scale makes finite. Returns the losses of the rank's
    micro-batches by (step, number), pieces of weights and moments, what became of each step and the scale after it."""
    from pipeline import collectives
    from pipeline.models.batch_norm import NormSync
    from pipeline.training.config import EngineConfig, OptimizerConfig
    from pipeline.training.engine import build_engine, import_deepspeed
    from pipeline.training.engine_state import owned_pieces
    from pipeline.training.optimizer import build_optimizer

    warnings.simplefilter("ignore")
    import_deepspeed().init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    rank, world_size = collectives.rank(), collectives.world_size()
    model = build(kind, **changes)
    norms = NormSync(model)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-3, betas=(BETA, 0.999)))
    config = EngineConfig(**engine_options)
    engine, scale = build_engine(model, optimizer, config, STEP_MICRO_BATCHES // world_size)
    scale.load((2.0**10, 0))  # its own first one may be too much for a step or two
    losses, applied, scales = {}, [], [scale.value]
    for step in range(steps):
        targets = sum(micro_batch(kind, step, number).targets for number in range(STEP_MICRO_BATCHES))
        for number in range(rank, STEP_MICRO_BATCHES, world_size):
            torch.manual_seed(100 * step + number)
            output = engine(micro_batch(kind, step, number))
            loss = torch.stack([value.float() for value in output.losses.values()]).sum()
            losses[step, number] = loss.item()
            factor = world_size / targets * (float("inf") if step in poison and number == 0 else 1.0)
            engine.backward(scale.apply(loss * factor), scale_wrt_gas=False)
            engine.step()
        applied.append(engine.was_step_applied())
        norms.step() if applied[-1] else norms.discard()
        scale.update(applied[-1])
        scales.append(scale.value)
    pieces = [(piece.name, piece.part, piece.start, piece.values.clone()) for piece in owned_pieces(engine)]
    norm = engine.get_global_grad_norm()
    return {
        "losses": losses,
        "pieces": pieces,
        "applied": applied,
        "scales": scales,
        "norm": None if norm is None else float(norm),
        "shapes": {name: getattr(found, "ds_shape", found.shape) for name, found in model.named_parameters()},
        "norms": [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms.norms],
        "buffers": {value.dtype for value in model.buffers() if value.is_floating_point()},
    }


def take_all(cases: list[tuple[str, dict[str, Any], int, dict[str, Any]]]) -> list[Any]:
    """Several cases on the ranks that exist: kind, engine's options, steps, and more of :func:`take_steps`."""
    return [take_steps(kind, options, steps, **more) for kind, options, steps, more in cases]


def joined(results: list[dict[str, Any]], part: str) -> dict[str, Tensor]:
    """Whole tensors of all ranks' pieces."""
    found: dict[str, Tensor] = {}
    for result in results:
        for name, of_part, start, values in result["pieces"]:
            if of_part == part:
                whole = found.setdefault(name, torch.full((result["shapes"][name].numel(),), float("nan")))
                whole[start : start + len(values)] = values
    return {name: values.view(results[0]["shapes"][name]) for name, values in found.items()}


def gradients(results: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Those of the first step, of all ranks' pieces of Adam's first moment."""
    return {name: moment / (1 - BETA) for name, moment in joined(results, "exp_avg").items()}


def assert_gradients(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Sums over micro-batches in another order: 1e-7 of the largest summands."""
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name],
            gradient,
            rtol=1e-4,
            atol=2e-6 * float(gradient.abs().max()) + 1e-9,
            msg=lambda text, name=name: f"{name}: {text}",
        )
