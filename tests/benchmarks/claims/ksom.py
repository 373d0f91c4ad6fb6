"""Irie et al. (arXiv 2302.07950): a Kohonen map's layer does not depend on how counts start and how empty codes are
treated, where EMA-VQ does; both end at the same loss; the map's codes come to lie in order."""

from __future__ import annotations

from tests.benchmarks.claims.claim import OF_32_PIXELS, Claim, Row, metric, steps_to_within

NEIGHBOURHOODS = {"EMA-VQ": "none", "KSOM hard": "hard", "KSOM exponential": "exponential"}


def _row(name: str, neighbourhood: str, count_init: int, update_empty: bool) -> Row:
    rule = "update-0" if update_empty else "no-update-0"
    changes = {"neighbourhood": neighbourhood, "count_init": count_init, "update_empty": str(update_empty).lower()}
    return Row(
        f"{name}, N0={count_init}, {rule}",
        ("quantizer.kind=ksom", *(f"quantizer.{key}={value}" for key, value in changes.items())),
    )


CLAIM = Claim(
    title="KSOM: robust where EMA-VQ is not",
    about=(
        "The paper's tables were not to be had; its claims are: (a) EMA-VQ fails or varies for N0 = 0, KSOM does not; "
        "(b) with N0 = 1 both end at the same loss; (c) KSOM is faster only early on; (d) the codebook becomes ordered "
        "on the grid. Steps to +10 % and +20 %: until the training error comes that near to the run's own best; the "
        "paper takes the validation error."
    ),
    recipe="image/vqvae_cifar10",
    data="tiles",
    rows=[
        _row(name, neighbourhood, count_init, update_empty)
        for name, neighbourhood in NEIGHBOURHOODS.items()
        for count_init in (0, 1)
        for update_empty in (True, False)
        if neighbourhood != "exponential" or (count_init, update_empty) == (1, True)
    ],
    columns={
        "MSE × 1000": metric("mse", 2, 1000),
        "perplexity": metric("codebook_perplexity", 0),
        "codes in use, %": metric("codebook_usage", 0, 100),
        "steps to +20 %": steps_to_within("mse", 0.2),
        "steps to +10 %": steps_to_within("mse", 0.1),
        "grid correlation": metric("grid_correlation", 2),
        "topographic error": metric("topographic_error", 2),
    },
    quick=(
        *OF_32_PIXELS,
        "model.channels=64",
        "training.steps=800",
        "training.log_every=10",
    ),
    seeds=2,
)
