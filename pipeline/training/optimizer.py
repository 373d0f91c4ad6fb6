"""The optimiser and which parameters it decays.

In: a model and an OptimizerConfig. Out: a torch optimiser for DeepSpeed to wrap. torch's own, so that nothing is
compiled at start-up and the CPU and the GPU run the same update.
"""

from __future__ import annotations

import torch
from torch import nn

from pipeline.quantizers import Quantizer
from pipeline.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups, "decayed" and "free": codebooks, norms, biases and single vectors are never decayed.

    A decayed codebook is pulled towards the origin, where no latent asked for a code (Huh et al., section 5.8: none on
    codes).
    """
    of_quantizers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Quantizer)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    free = [parameter for parameter in trained if parameter.ndim <= 1 or id(parameter) in of_quantizers]
    free_ids = {id(parameter) for parameter in free}
    decayed = [parameter for parameter in trained if id(parameter) not in free_ids]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": free, "weight_decay": 0.0, "name": "free"},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD over :func:`parameter_groups`; the loop sets the learning rate before each step."""
    groups = parameter_groups(model, config.weight_decay)
    if config.kind == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.kind]
    return kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.epsilon)
