"""How unlike originals and reconstructions are to networks: Fréchet distances and LPIPS.

In: batches of originals and reconstructions in [0, 1], and the files of networks that the user has. Out: a number each,
and which files it was measured with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.frechet import FrechetDistance, RandomFeatures
from pipeline.models.given_weights import read_given


@dataclass(frozen=True)
class NetworkFiles:
    """Files of networks, none of which is needed: what needs one is measured where it is given."""

    inception: Path | None = None
    """Inception v3 for rFID, see :class:`pipeline.evaluation.inception.InceptionFeatures`."""
    lpips: Path | None = None
    """torchvision's VGG16 or AlexNet for LPIPS."""
    lpips_heads: Path | None = None
    """LPIPS's weights of the channels; by default those that come with torchmetrics."""


class ImageDistances:
    """``rfd_random`` always; ``rfid`` (``rfid_torchvision`` with torchvision's weights) and ``lpips`` where their files
    are given.
    """

    def __init__(self, files: NetworkFiles, device: str) -> None:
        """Raises WeightsError for a file that does not hold what it is given for, ValueError for heads without their
        network.
        """
        self.device = device
        self.networks: dict[str, dict[str, str]] = {}
        self._frechet = {"rfd_random": FrechetDistance(RandomFeatures().to(device))}
        self._lpips: Any = None
        self._lpips_sum = 0.0
        self._lpips_images = 0
        if files.inception is not None:
            from pipeline.evaluation.inception import InceptionFeatures

            features = InceptionFeatures(read_given(files.inception))
            name = "rfid" if features.layout == "fid" else "rfid_torchvision"
            self._frechet[name] = FrechetDistance(features.to(device))
            self.networks["inception"] = {"file": str(files.inception), "sha256": features.sha256}
        if files.lpips is None and files.lpips_heads is not None:
            raise ValueError(f"{files.lpips_heads} holds LPIPS's heads: give the network too, with --lpips-weights")
        if files.lpips is not None:
            from pipeline.models.lpips import Lpips

            heads = read_given(files.lpips_heads) if files.lpips_heads is not None else None
            self._lpips = Lpips(read_given(files.lpips), heads).to(device)
            self.networks[self._lpips.network] = {"file": str(files.lpips), "sha256": self._lpips.backbone_sha256}
            of_heads = str(files.lpips_heads or "torchmetrics")
            self.networks["lpips_heads"] = {"file": of_heads, "sha256": self._lpips.heads_sha256}

    @torch.no_grad()
    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add images ``(batch, 3, height, width)``. Reconstructions are clipped to [0, 1], as a viewer would."""
        originals = originals.to(self.device).float()
        reconstructions = reconstructions.to(self.device).float().clamp(0, 1)
        for distance in self._frechet.values():
            distance.add(originals, reconstructions)
        if self._lpips is not None and min(originals.shape[-2:]) >= self._lpips.smallest_side:
            self._lpips_sum += float(self._lpips(originals, reconstructions).double().sum())
            self._lpips_images += len(originals)

    def compute(self) -> dict[str, Any]:
        """Distances by name, None where images are too few or too small; with files given also ``networks``: the file
        and SHA-256 of each."""
        values: dict[str, Any] = {name: distance.compute() for name, distance in self._frechet.items()}
        if self._lpips is not None:
            values["lpips"] = self._lpips_sum / self._lpips_images if self._lpips_images else None
        return values | ({"networks": self.networks} if self.networks else {})
