"""LPIPS: how unlike two images look, by the features of a network that classifies images.

Zhang et al., The unreasonable effectiveness of deep features as a perceptual metric, 2018 (arXiv 1801.03924), equation
1: at each place of each of five layers, features are brought to unit length, their squared differences weighted by
channel, averaged over places, and the layers added up. In: weights by path, and pairs of images. Out: a distance a
pair, differentiable.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.models.given_weights import GivenWeights, put_given, read_given
from pipeline.models.published import WeightsError

TAPS = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
"""The layers of torchvision's `features` whose outputs are compared: the last ReLU before each pooling of VGG16, each
ReLU of AlexNet."""
CHANNELS = {"vgg16": (64, 128, 256, 512, 512), "alexnet": (64, 192, 384, 256, 256)}
SMALLEST_SIDE = {"vgg16": 16, "alexnet": 31}
"""Pixels: less, and the last pooling has nothing to pool."""
_HEADS = {"vgg16": "vgg.pth", "alexnet": "alex.pth"}
_FLOOR = 1e-8  # under the root of a feature's length: where no channel answers, the gradient stays finite


class Lpips(nn.Module):
    """The distance, with a frozen network. Images are ``(batch, 3, height, width)`` in [0, 1]."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, backbone: GivenWeights, heads: GivenWeights | None = None) -> None:
        """``backbone`` is torchvision's VGG16 or AlexNet (its file tells which), ``heads`` the published weights of the
        channels, by default those that come with torchmetrics. Raises WeightsError for another file.
        """
        super().__init__()
        self.network = _network_of(backbone)
        with torch.device("meta"):
            self.features = _features(self.network)
            self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in CHANNELS[self.network])
        state = {name.removeprefix("features."): tensor for name, tensor in backbone.state.items()}
        state = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.")}
        put_given(self.features, state, backbone.file, f"torchvision's {self.network}")
        heads = heads or read_given(_bundled_heads(self.network))
        layers = {name.removeprefix("lin").replace(".model.1", ""): each for name, each in heads.state.items()}
        put_given(self.heads, layers, heads.file, f"the LPIPS weights of the channels of {self.network}")
        self.backbone_sha256, self.heads_sha256 = backbone.sha256, heads.sha256
        # ImageNet's statistics, as the published network has them on pixels in [-1, 1]
        mean, deviation = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        self.register_buffer("mean", mean[:, None, None], persistent=False)
        self.register_buffer("deviation", deviation[:, None, None], persistent=False)

    @property
    def smallest_side(self) -> int:
        """Images smaller than this have no distance."""
        return SMALLEST_SIDE[self.network]

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances ``(batch,)``, fp32. Raises ValueError for images smaller than the network's poolings allow."""
        if min(first.shape[-2:]) < self.smallest_side:
            raise ValueError(
                f"LPIPS by {self.network} needs images of at least {self.smallest_side} pixels a side, "
                f"not {first.shape[-2]} × {first.shape[-1]}"
            )
        distances = torch.zeros(len(first), device=first.device)
        for head, one, other in zip(self.heads, self._layers(first), self._layers(second), strict=True):
            distances = distances + head((_unit(one) - _unit(other)).square()).mean(dim=(1, 2, 3))
        return distances

    def _layers(self, images: Tensor) -> list[Tensor]:
        features = (images.float() * 2 - 1 - self.mean) / self.deviation
        layers = []
        for place, layer in enumerate(self.features):
            features = layer(features)
            if place in TAPS[self.network]:
                layers.append(features)
        return layers


def _unit(features: Tensor) -> Tensor:
    """Each place's features ``(batch, channels, height, width)`` at length 1."""
    return features / (features.square().sum(dim=1, keepdim=True) + _FLOOR).sqrt()


def _features(network: str) -> nn.Sequential:
    """The convolutions of torchvision's network up to the last layer that is compared, nothing done in place."""
    from torchvision import models

    layers = list(getattr(models, network)(weights=None).features)[: TAPS[network][-1] + 1]
    kept = [nn.ReLU() if isinstance(layer, nn.ReLU) else layer for layer in layers]
    return nn.Sequential(*kept)


def _network_of(backbone: GivenWeights) -> str:
    first = backbone.state.get("features.0.weight")
    shapes = {torch.Size((64, 3, 3, 3)): "vgg16", torch.Size((64, 3, 11, 11)): "alexnet"}
    if first is None or first.shape not in shapes:
        raise WeightsError(
            f"{backbone.file} holds neither torchvision's VGG16 nor its AlexNet: give vgg16-397923af.pth or "
            "alexnet-owt-7be5be79.pth, as torchvision publishes them"
        )
    return shapes[first.shape]


def _bundled_heads(network: str) -> Path:
    """The file of torchmetrics, found without loading it."""
    spec = find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "functional" / "image" / "lpips_models" / _HEADS[network]
