"""How like the originals the reconstructed images are, over a whole set.

In: batches of originals and reconstructions in [0, 1]. Out: MSE, PSNR, SSIM and MS-SSIM of everything that was added.
"""

from __future__ import annotations

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import (
    MultiScaleStructuralSimilarityIndexMeasure,
    PeakSignalNoiseRatio,
    StructuralSimilarityIndexMeasure,
)

DATA_RANGE = 1.0
"""Pixels lie in [0, 1]. A range of 2 on such pixels, as some published code has it, inflates SSIM."""
SMALLEST_SIDE = 11
"""SSIM compares windows of 11 × 11 pixels."""
SMALLEST_MULTI_SCALE_SIDE = 16 * SMALLEST_SIDE
"""MS-SSIM compares the same windows on images that were halved four times."""


class ImageQuality:
    """PSNR, SSIM and MS-SSIM by torchmetrics.

    ``psnr`` is that of the whole set's mean squared error (not a mean of images' PSNR), in decibels; ``ssim`` and
    ``ms_ssim`` are means over images, None for images smaller than their windows.
    """

    def __init__(self) -> None:
        self.images = 0
        self._squared_error = 0.0
        self._pixels = 0
        self._psnr = PeakSignalNoiseRatio(data_range=DATA_RANGE)
        self._ssim: Metric = StructuralSimilarityIndexMeasure(data_range=DATA_RANGE)
        self._ssim_images = 0
        self._ms_ssim: Metric = MultiScaleStructuralSimilarityIndexMeasure(data_range=DATA_RANGE)
        self._ms_ssim_images = 0

    def add(self, originals: Tensor, reconstructions: Tensor) -> None:
        """Add images ``(batch, 3, height, width)``. Reconstructions are clipped to [0, 1], as a viewer would.

        Raises ValueError for originals outside [0, 1].
        """
        if originals.min() < 0 or originals.max() > 1:
            raise ValueError(
                f"pixels lie in {float(originals.min()):.3f} … {float(originals.max()):.3f}: give originals in [0, 1]"
            )
        originals = originals.detach().float().cpu()
        reconstructions = reconstructions.detach().float().cpu().clamp(0, 1)
        self._psnr.update(reconstructions, originals)
        if min(originals.shape[-2:]) >= SMALLEST_SIDE:
            self._ssim.update(reconstructions, originals)
            self._ssim_images += len(originals)
        if min(originals.shape[-2:]) >= SMALLEST_MULTI_SCALE_SIDE:
            self._ms_ssim.update(reconstructions, originals)
            self._ms_ssim_images += len(originals)
        self._squared_error += float((reconstructions.double() - originals.double()).square().sum())
        self._pixels += originals.numel()
        self.images += len(originals)

    def compute(self) -> dict[str, float | None]:
        """``mse``, ``psnr``, ``ssim`` and ``ms_ssim``; raises ValueError when no image was added."""
        if not self.images:
            raise ValueError("no images were added: reconstruction metrics need at least one")
        return {
            "mse": self._squared_error / self._pixels,
            "psnr": float(self._psnr.compute()),
            "ssim": float(self._ssim.compute()) if self._ssim_images else None,
            "ms_ssim": float(self._ms_ssim.compute()) if self._ms_ssim_images else None,
        }
