"""The Inception v3 whose features FID compares, with weights by path.

In: images in [0, 1] of any size. Out: features ``(batch, 2048)``. FID's network is TensorFlow's of 2015 (Heusel et al.,
arXiv 1706.08500), which pytorch-fid and torch-fidelity publish for torch; it pools otherwise than torchvision's. The
latter's weights are taken too, and give distances that can't be compared with published ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d
from torchvision.models import inception
from torchvision.models.inception import BasicConv2d

from pipeline.models.given_weights import GivenWeights, put_given
from pipeline.models.published import WeightsError

SIDE = 299
FEATURES = 2048
_LAYOUTS = {1008: "fid", 1000: "torchvision"}  # by the classes of the last layer


class _AverageOfTheInside:
    """Average pooling counts no padding."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x)  # type: ignore[misc]
        pooled = avg_pool2d(x, kernel_size=3, stride=1, padding=1, count_include_pad=False)
        return [*branches, self.branch_pool(pooled)]  # type: ignore[attr-defined]


class _InceptionA(_AverageOfTheInside, inception.InceptionA):
    pass


class _InceptionC(_AverageOfTheInside, inception.InceptionC):
    pass


class _InceptionE(_AverageOfTheInside, inception.InceptionE):
    pass


class _LastInceptionE(inception.InceptionE):
    """The last block takes the greatest where the others average."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        *branches, _ = super()._forward(x)
        return [*branches, self.branch_pool(max_pool2d(x, kernel_size=3, stride=1, padding=1))]


class InceptionFeatures(nn.Module):
    """Means over places of the last block's output; frozen, in evaluation mode."""

    def __init__(self, weights: GivenWeights) -> None:
        """Raises WeightsError for a file that holds neither layout of Inception v3."""
        super().__init__()
        last = weights.state.get("fc.weight")
        if last is None or last.shape[1:] != (FEATURES,) or last.shape[0] not in _LAYOUTS:
            raise WeightsError(
                f"{weights.file} does not hold Inception v3 (fc.weight of 1008 or 1000 × {FEATURES}): give "
                "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, torch-fidelity's weights-inception-2015-12-05-"
                "6726825d.pth, or torchvision's inception_v3_google-0cc3c7bd.pth"
            )
        self.layout = _LAYOUTS[last.shape[0]]
        self.sha256 = weights.sha256
        blocks: list[type[nn.Module]] = [
            BasicConv2d,
            _InceptionA,
            inception.InceptionB,
            _InceptionC,
            inception.InceptionD,
            _InceptionE,
            inception.InceptionAux,
        ]
        with torch.device("meta"):
            network = inception.Inception3(
                aux_logits=False, init_weights=False, inception_blocks=blocks if self.layout == "fid" else None
            )
            if self.layout == "fid":
                network.Mixed_7c = _LastInceptionE(FEATURES)
            network.fc = nn.Identity()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None
        state = {name: each for name, each in weights.state.items() if not name.startswith(("fc.", "AuxLogits."))}
        put_given(network, state, weights.file, "Inception v3")
        self.network = network.eval()

    def train(self, mode: bool = True) -> InceptionFeatures:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(batch, 3, height, width)`` in [0, 1], taken as bytes as FID does → ``(batch, 2048)``."""
        levels = (images.float() * 255).round()
        return self.network((resize(levels, SIDE) - 128) / 128)


def resize(images: Tensor, side: int) -> Tensor:
    """Bilinear, as TensorFlow 1 did it for FID: pixel n of the result lies at n · old / new, no half pixel is added,
    nothing is smoothed. ``(batch, channels, height, width)`` → ``(batch, channels, side, side)``.
    """
    for axis in (2, 3):
        size = images.shape[axis]
        places = torch.arange(side, dtype=torch.float32, device=images.device) * (size / side)
        below = places.floor().long().clamp(max=size - 1)
        share = (places - below).view([-1 if a == axis else 1 for a in range(4)])
        above = (below + 1).clamp(max=size - 1)
        low, high = images.index_select(axis, below), images.index_select(axis, above)
        images = low + (high - low) * share
    return images
