"""What judges reconstructions besides the error of their pixels: LPIPS, and a discriminator of patches that learns.

Esser et al., Taming transformers (arXiv 2012.09841), with the discriminator of Isola et al. (arXiv 1611.07004). In:
images and reconstructions. Out: losses, means over images or patches. Generator and discriminator are trained by one
backward and one optimiser: the generator's loss goes through the discriminator with its weights held fixed, the
discriminator's own loss takes the reconstructions as given, so that neither has a gradient by the other's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

from pipeline.models.batch_norm import BatchNorm
from pipeline.models.given_weights import GivenWeights, read_given
from pipeline.models.image_config import CriticOptions, DiscriminatorConfig, PerceptualConfig
from pipeline.models.lpips import Lpips
from pipeline.models.published import WeightsError


class Critics(nn.Module):
    """What a recipe asks for of both: nothing, one or the other."""

    def __init__(self, config: CriticOptions) -> None:
        super().__init__()
        self.config = config
        self.perceptual = PerceptualLoss(config.perceptual) if config.perceptual is not None else None
        self.discriminator = PatchDiscriminator(config.discriminator) if config.discriminator is not None else None

    def forward(
        self,
        images: Tensor,
        reconstructions: Tensor,
        pixels_of: Callable[[Tensor], Tensor],
        steps_done: Callable[[], int],
    ) -> dict[str, Tensor]:
        """Losses by name, means over images and patches. Images are normalised, ``(batch, 3, height, width)``;
        ``pixels_of`` brings them to [0, 1]; ``steps_done``, of the optimiser, is asked for a discriminator only,
        as it waits for a GPU."""
        losses: dict[str, Tensor] = {}
        if self.perceptual is not None:
            losses["perceptual"] = self.perceptual(pixels_of(images), pixels_of(reconstructions))
        if self.discriminator is not None and self.config.discriminator is not None:
            losses |= adversarial_losses(
                self.discriminator, self.config.discriminator, images, reconstructions, steps_done()
            )
        return losses


class PerceptualLoss:
    """LPIPS as a loss. No module: its frozen network is no part of a model, of its checkpoints or of its precision.

    The files are read, and their hashes compared with the recipe's, when it is first asked: at the start of training,
    and not where a trained model is used.
    """

    def __init__(self, config: PerceptualConfig) -> None:
        self.config = config
        self._network: Lpips | None = None

    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Weighted mean over images ``(batch, 3, height, width)`` in [0, 1]. Raises WeightsError for other files than
        the recipe names."""
        if self._network is None:
            config = self.config
            heads = _of_hash(config.heads, config.heads_sha256, "heads") if config.heads is not None else None
            self._network = Lpips(_of_hash(config.network, config.sha256, ""), heads)
        self._network.to(images.device)
        return self.config.weight * self._network(images, reconstructions).mean()


def _of_hash(file: Any, sha256: str | None, of: str) -> GivenWeights:
    given = read_given(file)
    if given.sha256 != sha256:
        key = f"model.perceptual.{of}_sha256" if of else "model.perceptual.sha256"
        raise WeightsError(f"{file} has sha256 {given.sha256}, not {key}={sha256}: give the file that the recipe means")
    return given


class PatchDiscriminator(nn.Module):
    """Real or reconstructed, for each of many overlapping patches; 70 pixels a side with three layers.

    Micro-batches of real and of reconstructed images are each normalised by their own statistics.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.layers + 1):
            wider = config.channels * min(2**layer, 8)
            stride = 2 if layer < config.layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False), BatchNorm(wider)]
            layers.append(nn.LeakyReLU(0.2))
            width = wider
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)
        self.smallest_side = 3 * 2**config.layers
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, BatchNorm):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(batch, 3, height, width)`` → a score a patch, ``(batch, 1, h, w)``; above 0: real.
        Raises ValueError for images smaller than a patch needs."""
        if min(images.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"images of {images.shape[-2]} × {images.shape[-1]} are too small for the discriminator: use images of "
                f"{self.smallest_side} pixels a side, fewer model.discriminator.layers, or none"
            )
        return self.layers(images)


def adversarial_losses(
    discriminator: PatchDiscriminator, config: DiscriminatorConfig, images: Tensor, reconstructions: Tensor, step: int
) -> dict[str, Tensor]:
    """The generator's loss ``adversarial`` and the discriminator's hinge loss ``discriminator`` (Lim and Ye, arXiv
    1705.02894), means over patches. Before ``start_step`` both are 0, and so are the discriminator's gradients: there
    are some, as an optimiser that shards them waits for every one.

    images and reconstructions, normalised, ``(batch, 3, height, width)``. Raises ValueError where weights are
    partitioned over ranks.
    """
    parameters = dict(discriminator.named_parameters())
    if not all(parameter.numel() for parameter in parameters.values()):
        raise ValueError("engine.zero_stage=3 keeps no whole weights of a discriminator: use engine.zero_stage=2")
    if step < config.start_step:
        nothing = torch.stack([0.0 * each.float().sum() for each in parameters.values()]).sum()
        return {"adversarial": nothing.detach(), "discriminator": nothing}
    precision = next(iter(parameters.values())).dtype
    images, reconstructions = images.to(precision), reconstructions.to(precision)
    held = {name: parameter.detach() for name, parameter in parameters.items()}
    fooled = functional_call(discriminator, held, (reconstructions,)).float()
    real = discriminator(images).float()
    seen_through = discriminator(reconstructions.detach()).float()
    return {
        "adversarial": -config.weight * fooled.mean(),
        "discriminator": 0.5 * (relu(1 - real).mean() + relu(1 + seen_through).mean()),
    }
