"""Zhao et al. (arXiv 2411.16550): codes set by k-means on what an untrained encoder makes collapse, the more so the
more codes there are; an encoder that was trained without a quantizer first uses them. Too small an encoder merges what
is different, whatever comes after it."""

from __future__ import annotations

from tests.benchmarks.claims.claim import OF_32_PIXELS, Claim, Row, metric

CODES = (16, 64, 256, 1024)
CHANNELS = (4, 8, 16, 32)
PRETRAINED = "phases=[{quantizer: identity}, {initialise: kmeans}]"
SWEPT_CODES = 64
"""Codes in the sweep of the encoder's width."""


def _row(codes: int, channels: int | None, pretrained: bool) -> Row:
    """``channels``: the encoder's width, none for the recipe's."""
    name = f"{codes} codes" if channels is None else f"{codes} codes, encoder of {channels} channels"
    changes = ["quantizer.kind=ema", f"quantizer.codes={codes}"]
    changes += [] if channels is None else [f"model.channels={channels}", f"model.residual_channels={channels}"]
    # Latents are 64 in an image of 32 pixels: k-means wants as many as there are codes, and some to choose from.
    changes.append("codebooks.initialise_steps=8")
    if pretrained:
        return Row(f"{name}, pretrained", (*changes, PRETRAINED))
    return Row(name, (*changes, "codebooks.initialise=kmeans"))


CLAIM = Claim(
    title="Representation collapse: pretraining without a quantizer",
    about=(
        "The paper's figures were not to be had. Its claims: without pretraining the perplexity stays where it is "
        "however many codes there are, with it it grows with them; at small codebooks pretraining is slightly worse; "
        "small encoders lose more than codes can bring back. A pretrained row trains as many steps again without a "
        "quantizer first, as the paper's do."
    ),
    recipe="image/vqvae_cifar10",
    data="tiles",
    rows=[
        *(_row(codes, None, pretrained) for codes in CODES for pretrained in (False, True)),
        *(_row(SWEPT_CODES, channels, pretrained) for channels in CHANNELS for pretrained in (False, True)),
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
