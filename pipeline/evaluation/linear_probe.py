"""Logistic regression on frozen features: how much of a label a straight cut finds in them.

In: features ``(clips, dim)`` and labels ``(clips,)``. Out: balanced accuracy on clips that were not fitted. Pure; fp64
on the CPU, no random numbers: the problem is convex, so every start ends in the same place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PENALTY = 1e-2
"""Weight of the squared norm of the coefficients beside the mean cross-entropy, of standardised features. Fixed: one
chosen on the test clips would flatter whoever has more features."""
ITERATIONS = 300
SMALLEST_DEVIATION = 1e-6
"""Of a feature's mean: one that varies less is a constant, and dividing by its deviation would blow up rounding."""


def probe_accuracy(features: Tensor, labels: Tensor, train: list[int], test: list[int]) -> float:
    """Fit on the clips ``train`` and return the balanced accuracy on ``test``: the mean over classes of the share of
    their clips that are told right; chance is 1 / classes.

    Features are standardised with the training clips' mean and deviation; every class weighs the same, however many
    clips it has. Raises ValueError unless both parts hold the same classes, two or more.
    """
    classes, numbers = torch.unique(labels[train + test], return_inverse=True)
    y, y_test = numbers[: len(train)], numbers[len(train) :]
    if len(classes) < 2 or len(y.unique()) < len(classes) or len(y_test.unique()) < len(classes):
        raise ValueError(
            f"a probe needs two classes or more, each with clips to fit and to test: {len(y.unique())} of "
            f"{len(classes)} have clips to fit, {len(y_test.unique())} clips to test"
        )
    x = features[train].double().cpu()
    mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
    deviation = torch.where(deviation > SMALLEST_DEVIATION * mean.abs(), deviation, torch.inf)
    weights, bias = _fit((x - mean) / deviation, y, len(classes))
    predicted = (((features[test].double().cpu() - mean) / deviation) @ weights + bias).argmax(dim=1)
    recalls = [(predicted[y_test == number] == number).double().mean() for number in range(len(classes))]
    return float(torch.stack(recalls).mean())


def _fit(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Coefficients ``(dim, classes)`` and offsets ``(classes,)`` of the penalised, class-balanced regression."""
    weights = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    of_class = len(y) / (classes * y.bincount(minlength=classes).double())
    optimiser = torch.optim.LBFGS(
        [weights, bias], max_iter=ITERATIONS, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = functional.cross_entropy(x @ weights + bias, y, weight=of_class) + PENALTY * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()
