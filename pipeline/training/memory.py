"""What a rank's memory holds at the fullest moment of training, by part.

In: the sizes of a model, what its activations take (:mod:`pipeline.training.activations`), the engine's configuration
and the number of ranks. Out: bytes. Pure functions.

ZeRO shares out what its stages name (Rajbhandari et al., arXiv 1910.02054, section 5); what DeepSpeed 0.19 keeps beside
that was read from its code and compared with what torch's allocator counts, see tests/training/test_memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from pipeline.quantizers import Quantizer
from pipeline.training.activations import Activations, Device
from pipeline.training.config import EngineConfig
from pipeline.training.engine import engine_settings

WIDTH = 4  # bytes of a weight, a gradient and a moment in any precision: half precision is autocast's
MOST_LIVE = 10**9
"""Weights that ZeRO 3 keeps gathered between forward and backward: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class ModelSizes:
    """What of a model decides its memory."""

    parameters: int
    """Trained weights."""
    largest: int
    """Weights of the largest tensor."""
    codebook_state: int
    """Bytes of the quantizers' buffers; learned codes are weights."""
    pending: int
    """Bytes of a step's statistics of codebooks."""

    def checkpoint(self, moments: int, averaged: bool) -> int:
        """Bytes of a checkpoint on disk, of all ranks: weights, their average if there is one, the optimiser's moments
        and codebooks."""
        return (1 + moments + averaged) * WIDTH * self.parameters + self.codebook_state


@dataclass(frozen=True)
class RankMemory:
    """Bytes on a rank: the first six stay for the whole run, ``activations`` and ``step`` come and go in turn."""

    weights: int
    """The rank's share under ZeRO 3, and all of them while they are gathered."""
    gradients: int
    optimizer: int
    """The moments, and the share of the weights that ZeRO updates."""
    average: int
    """Its share of the weights' average."""
    codebooks: int
    micro_batches: int
    """On a CPU all that are decoded ahead, on a GPU the one that is worked on."""
    buckets: int
    """Where ZeRO joins gradients for a collective."""
    activations: int
    step: int
    """With no activations left: copies of gradients on the way to other ranks, and what the optimiser works with."""

    @property
    def total(self) -> int:
        """Most at one time."""
        kept = self.weights + self.gradients + self.optimizer + self.average + self.codebooks + self.micro_batches
        return kept + self.buckets + max(self.activations, self.step)


def model_sizes(model: nn.Module) -> ModelSizes:
    """Count a model's weights and codebooks."""
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    return ModelSizes(
        parameters=sum(trained),
        largest=max(trained, default=0),
        codebook_state=sum(buffer.nbytes for quantizer in quantizers for buffer in quantizer.buffers(recurse=False)),
        pending=sum(tensor.nbytes for quantizer in quantizers for tensor in quantizer.pending()),
    )


def rank_memory(
    sizes: ModelSizes,
    found: Activations,
    engine: EngineConfig,
    device: Device,
    *,
    ranks: int,
    accumulation: int,
    ahead: int,
    moments: int = 2,
    averaged: bool = False,
) -> RankMemory:
    """A rank's memory: ``accumulation`` micro-batches a step and rank, ``ahead`` steps decoded ahead; ``moments`` that
    the optimiser keeps of a weight, and whether an average of the weights is kept too."""
    stage, whole = engine.zero_stage, WIDTH * sizes.parameters
    share = -(-whole // ranks)
    settings = engine_settings(engine, accumulation, sizes.parameters)["zero_optimization"]
    bucket = WIDTH * settings["reduce_bucket_size"] if stage else 0
    joined = min(whole, bucket) if stage else whole  # gradients that one collective carries
    sent = joined if ranks > 1 else 0
    # The flat gradient of its share, and the optimiser's temporary tensors: torch's loops over tensors on a CPU, and
    # treats them together on a GPU.
    temporary = 2 * WIDTH * sizes.largest if device == "cpu" else whole
    working = 3 * share if device == "cpu" else 2 * share
    memory = RankMemory(
        weights=whole,
        gradients=whole,
        optimizer=moments * share + share,
        average=share if averaged else 0,
        codebooks=sizes.codebook_state + 2 * sizes.pending,
        micro_batches=found.batch * (accumulation * (ahead + 1) if device == "cpu" else 1),
        buckets=bucket,
        activations=found.peak,
        step=working,
    )
    if stage == 0:
        return replace(memory, optimizer=moments * whole, step=max(sent, temporary))
    if stage == 2:
        return replace(memory, gradients=share, step=max(working, share + min(sent, share)))
    if stage == 3:
        gathered = WIDTH * min(sizes.parameters, MOST_LIVE) if ranks > 1 else 0
        return replace(memory, weights=share + gathered, gradients=share, step=max(working, 2 * joined - gathered))
    return memory
