"""Huh et al. (arXiv 2305.08842), Table 3: affine codes, synchronised and alternating updates, replacement and l2
normalisation, one after another."""

from __future__ import annotations

from tests.benchmarks.claims.claim import OF_32_PIXELS, Claim, Row, metric

SAME = ("quantizer.codes=1024", "quantizer.beta=0.995", "codebooks.initialise=none")
"""In all rows, so that they differ in what their names say."""
PLAIN = ("quantizer.normalise=none", "quantizer.replace_after=0", *SAME)
STE = ("quantizer.kind=ste", *PLAIN)
AFFINE = ("quantizer.kind=affine", *PLAIN)
OPT = ("quantizer.sync_nu=0.2", "quantizer.inner_steps=4")
REPLACE = ("quantizer.replace_after=20",)
L2 = ("quantizer.normalise=l2",)


def _row(name: str, changes: tuple[str, ...], mse: str, perplexity: str) -> Row:
    return Row(name, changes, {"MSE × 1000": mse, "perplexity": perplexity})


CLAIM = Claim(
    title="Affine codes and their helpers",
    about=(
        "The paper's CIFAR-10 column. Pixels of the paper lie in [0, 1], images and budget are others here: compare "
        "the order of the rows, not their values. SQ-VAE, one of the paper's baselines, is no kind of this project."
    ),
    recipe="image/sqvae_cifar10",
    data="tiles",
    rows=[
        _row("VQ-VAE", STE, "5.65", "14.0"),
        _row("+ l2", (*STE, *L2), "3.21", "57.0"),
        _row("+ replace", (*STE, *REPLACE), "4.07", "109.8"),
        _row("+ l2 + replace", (*STE, *L2, *REPLACE), "3.24", "115.6"),
        _row("Gumbel", ("quantizer.kind=gumbel", "quantizer.groups=1", "quantizer.codes=1024"), "6.16", "20.3"),
        _row("+ affine", AFFINE, "5.15", "69.5"),
        _row("+ sync + alternating", (*STE, *OPT), "4.73", "15.5"),
        _row("+ affine + sync + alternating", (*AFFINE, *OPT), "4.00", "79.3"),
        _row("+ affine + sync + alternating + replace", (*AFFINE, *OPT, *REPLACE), "1.81", "290.9"),
        _row("all + l2", (*AFFINE, *OPT, *REPLACE, *L2), "1.74", "608.6"),
    ],
    columns={
        "MSE × 1000": metric("mse", 2, 1000),
        "perplexity": metric("codebook_perplexity", 0),
        "codes in use, %": metric("codebook_usage", 0, 100),
        "PSNR, dB": metric("psnr", 1),
    },
    quick=(
        *OF_32_PIXELS,
        "model.residual_layers=1",
        "optimizer.learning_rate=1.0e-3",
        "training.steps=800",
        "schedule.warmup_steps=50",
    ),
)
