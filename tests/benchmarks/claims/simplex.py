"""Morita (arXiv 2509.22161): the K-nearest-neighbour regulariser makes mixtures of codes nearly single codes and uses
nearly all codes, without Gumbel noise; beside what others do about unused codes."""

from __future__ import annotations

from tests.benchmarks.claims.claim import OF_32_PIXELS, Claim, Row, last_logged, metric

KNN = ("quantizer.kind=knn_simplex", "quantizer.neighbours=2", "quantizer.weight=0.1")
GUMBEL = ("quantizer.kind=gumbel", "quantizer.groups=1", "quantizer.codes=512")

CLAIM = Claim(
    title="KNN simplex: codes used, and no gap between training and inference",
    about=(
        "The paper's tables were not to be had. Its claim: nearly all codes are used, and the decoder sees at "
        "inference what it saw in training, which smoothed quantizers without the regulariser do not manage. "
        "Error in training: of what the decoder was trained with, mixtures where there are some; at inference: of "
        "single codes."
    ),
    recipe="image/vqvae_cifar10",
    data="tiles",
    rows=[
        Row("straight-through", ("quantizer.kind=ste",)),
        Row("rotation trick", ("quantizer.kind=rotation",)),
        Row("Gumbel, no regulariser", (*GUMBEL, "quantizer.diversity_weight=0")),
        Row("Gumbel, perplexity regulariser", (*GUMBEL, "quantizer.diversity_weight=0.1")),
        Row("softmax, no regulariser", (*KNN, "quantizer.weight=0")),
        Row("softmax, KNN cross-entropy", KNN),
        Row("softmax, KNN l2", (*KNN, "quantizer.distance=l2", "quantizer.weight=1")),
        Row("Gumbel softmax, KNN cross-entropy", (*KNN, "quantizer.sampler=gumbel")),
    ],
    columns={
        "MSE × 1000 in training": last_logged("mse", 2, 1000),
        "at inference": metric("mse", 2, 1000),
        "soft/hard gap": metric("soft_hard_gap", 4),
        "perplexity": metric("codebook_perplexity", 0),
        "codes in use, %": metric("codebook_usage", 0, 100),
    },
    quick=(
        *OF_32_PIXELS,
        "model.channels=64",
        "training.steps=800",
    ),
)
