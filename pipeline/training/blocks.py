"""Activation checkpointing and torch.compile, block by block.

In: a model that names its ``blocks``: layers that change no state and draw from torch's generator only, so that they
may be computed twice. Out: the same model; names of parameters stay as they are. Quantizers are never among the blocks:
their statistics would count twice, and their state is kept out of compiled graphs.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pipeline.training.config import EngineConfig


def wrap_blocks(model: nn.Module, config: EngineConfig) -> None:
    """Compile the blocks, and let them forget their activations, as the configuration wants. Before the engine is
    built, and once."""
    for block in getattr(model, "blocks", []):
        if config.compile:
            block.forward = torch.compile(block.forward)
        if config.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
