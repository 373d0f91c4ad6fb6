"""Zhao et al. (arXiv 2411.16550): codes set by k-means on what an untrained encoder makes collapse, the more so the
more codes there are; an encoder that was trained without a quantizer first uses them. Too small an encoder merges what
is different, whatever comes after it."""

from __future__ import annotations

from tests.benchmarks.claims.claim import OF_32_PIXELS, Claim, Row, metric

CODES = (16, 64, 256, 1024)
CHANNELS = (4, 8, 16, 32)
SWEPT_CODES = 64
"""Codes in the sweep of the encoder's width."""


def _row(codes: int, channels: int | None, *changes: str, after: str = "") -> Row:
    """``channels``: the encoder's width, none for the recipe's; ``after``: behind the name."""
    name = f"{codes} codes" if channels is None else f"{codes} codes, encoder of {channels} channels"
    width = [] if channels is None else [f"model.channels={channels}", f"model.residual_channels={channels}"]
    # Latents are 64 in an image of 32 pixels: k-means wants as many as there are codes, and some to choose from.
    return Row(
        name + after,
        ("quantizer.kind=ema", f"quantizer.codes={codes}", *width, "codebooks.initialise_steps=8", *changes),
    )


def _pair(codes: int, channels: int | None) -> list[Row]:
    return [
        _row(codes, channels, "codebooks.initialise=kmeans"),
        _row(codes, channels, "phases=[{quantizer: identity}, {initialise: kmeans}]", after=", pretrained"),
    ]


CLAIM = Claim(
    title="Representation collapse: pretraining without a quantizer",
    about=(
        "The paper's figures were not to be had. Its claims: without pretraining the perplexity stays where it is "
        "however many codes there are, with it it grows with them; at small codebooks pretraining is slightly worse; "
        "small encoders lose more than codes can bring back. A pretrained row trains as many steps again without a "
        "quantizer first, as the paper's do; one row has a quantizer in both phases."
    ),
    recipe="image/vqvae_cifar10",
    data="tiles",
    rows=[
        *(row for codes in CODES for row in _pair(codes, None)),
        _row(256, None, "phases=[{initialise: kmeans}, {initialise: none}]", after=", quantized in both phases"),
        *(row for channels in CHANNELS for row in _pair(SWEPT_CODES, channels)),
    ],
    columns={
        "MSE × 1000": metric("mse", 2, 1000),
        "perplexity": metric("codebook_perplexity", 0),
        "codes in use, %": metric("codebook_usage", 0, 100),
        "dimension of latents": metric("latent_dimension", 0),
        "of codes": metric("code_dimension", 0),
        "code spacing": metric("token_concentration", 2),
    },
    quick=(
        *OF_32_PIXELS,
        "model.channels=64",
        "training.steps=400",
    ),
)
