"""Codebooks from k-means over real latents, the same on any number of ranks.

In: a model and this rank's micro-batches. Out: codebooks set. May touch: the codebooks, nothing else of the model.

A sample of the latents, chosen by each token's key, is gathered in the order of the keys; then every rank runs the same
k-means on the same sample. Sums that went over the ranks in parts would round differently on another number of them,
and k-means turns a rounding error on a border into another codebook. A quantizer of several levels fits them one after
another, each to what the fitted ones before it leave over. Recipe: k-means++, 20 iterations of Lloyd (as many
as Zhao et al., arXiv 2605.06870), empty centres moved to the worst represented latents.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import collectives
from pipeline.codebooks.sample import LatentSample
from pipeline.quantizers.base import Quantizer, count_codes, look_up, sum_by_code
from pipeline.quantizers.keys import token_keys
from pipeline.quantizers.search import nearest_codes

PURPOSE = 1  # first part of the tokens' keys here


@torch.no_grad()
def initialise_codebooks(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "kmeans",
    process_group: Any = None,
    *,
    iterations: int = 20,
    samples_per_code: int = 32,
) -> None:
    """Set the codes of every quantizer in ``model`` from the latents that ``model(batch)`` brings to it.

    ``batches``: this rank's micro-batches; rank r of W brings numbers r, r + W, r + 2W … of the global batches. The
    model runs in evaluation mode and is left in the mode it had. At most ``samples_per_code · codes`` latents are
    looked at. Every rank calls it.

    Raises ValueError for another method, for a kind whose codes can't be set, and when fewer distinct latents came
    than there are codes; no codebook is changed then.
    """
    if method != "kmeans":
        raise ValueError(f"method={method!r} is unknown: use 'kmeans'")
    quantizers = {name: quantizer for name, quantizer in _outermost(model).items() if quantizer.codes}
    for name, quantizer in quantizers.items():
        for part in quantizer.modules():
            if isinstance(part, Quantizer) and type(part).set_codebook is Quantizer.set_codebook:
                raise ValueError(
                    f"quantizer {name or model.__class__.__name__} of kind {part.config.kind} has no codes that "
                    f"k-means can set: use no initialisation, or a kind that looks for the nearest code"
                )
    samples = {
        name: LatentSample(samples_per_code * quantizer.codes, PURPOSE) for name, quantizer in quantizers.items()
    }
    _collect(model, batches, quantizers, samples, process_group)

    before = {
        name: {key: tensor.clone() for key, tensor in quantizer.state_dict().items()}
        for name, quantizer in quantizers.items()
    }
    try:
        for name, quantizer in quantizers.items():
            latents = samples[name].gather(quantizer.codebook_dim, quantizer.updates.device, process_group)
            quantizer.fit_codebook(latents, partial(cluster, iterations=iterations))
    except Exception:
        for name, quantizer in quantizers.items():
            quantizer.load_state_dict(before[name])
        raise
    for quantizer in quantizers.values():
        for tensor in quantizer.state_dict().values():  # machines of different make may round differently
            collectives.broadcast(tensor, 0, process_group)


def _outermost(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of ``model`` that are no part of another one, by name."""
    found: dict[str, Quantizer] = {}
    parts: set[nn.Module] = set()
    for name, module in model.named_modules():  # a part comes after what it is part of
        if isinstance(module, Quantizer) and module not in parts:
            found[name] = module
            parts.update(module.modules())
    return found


def _collect(
    model: nn.Module,
    batches: Iterable[Any],
    quantizers: dict[str, Quantizer],
    samples: dict[str, LatentSample],
    group: Any,
) -> None:
    rank, world_size = collectives.rank(group), collectives.world_size(group)
    number = rank
    was_training = {module: module.training for module in model.modules()}

    def watch(name: str) -> Any:
        def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            latents = args[0] if args else kwargs["z"]
            mask = args[1] if len(args) > 1 else kwargs.get("mask")
            samples[name].add(module.real_latents(latents, mask), number)

        return look

    with ExitStack() as stack:
        for name, quantizer in quantizers.items():
            handle = quantizer.register_forward_pre_hook(watch(name), with_kwargs=True)
            stack.callback(handle.remove)
        model.eval()
        try:
            for batch in batches:
                model(batch)
                number += world_size
        finally:
            for module, training in was_training.items():
                module.training = training


def cluster(latents: Tensor, codes: int, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """K-means in each group: latents ``(tokens, groups, dim)`` → centres ``(groups, codes, dim)``, counts
    ``(groups, codes)``, both fp32. Deterministic.

    Raises ValueError when a group has fewer distinct latents than codes.
    """
    centres = torch.stack([_spread_centres(latents[:, group], codes) for group in range(latents.shape[1])])
    assigned: Tensor | None = None
    for _ in range(iterations):
        nearest = nearest_codes(latents, centres)
        if assigned is not None and torch.equal(nearest, assigned):
            break
        assigned = nearest
        counts = count_codes(assigned, codes)
        sums = sum_by_code(latents.double(), assigned, codes)
        means = (sums / counts.clamp(min=1).unsqueeze(-1)).float()
        centres = torch.where(counts.unsqueeze(-1) > 0, means, centres)
        _fill_empty(centres, latents, assigned, counts)
    return centres, count_codes(nearest_codes(latents, centres), codes)


def _spread_centres(latents: Tensor, codes: int) -> Tensor:
    """``codes`` rows of ``(tokens, dim)``, each drawn by its squared distance to those before it (k-means++: Arthur and
    Vassilvitskii, SODA 2007), with draws that are always the same."""
    draws = token_keys(codes, PURPOSE).double() / 2.0**63
    distances = torch.full((len(latents),), torch.inf, dtype=torch.float64, device=latents.device)
    places: list[Tensor] = []
    for number in range(codes):
        if places:
            newest = latents[places[-1]]
            distances = torch.minimum(distances, (latents - newest).square().sum(dim=1).double())
        cumulated = distances.cumsum(dim=0) if places else torch.ones_like(distances).cumsum(dim=0)
        if not len(latents) or cumulated[-1] == 0:
            raise ValueError(
                f"k-means found {number} distinct latents for {codes} codes: "
                "bring more batches (codebooks.initialise_steps) or use fewer codes"
            )
        place = torch.searchsorted(cumulated, draws[number] * cumulated[-1], right=True)
        places.append(place.clamp(max=len(latents) - 1))
    return latents[torch.stack(places)]


def _fill_empty(centres: Tensor, latents: Tensor, assigned: Tensor, counts: Tensor) -> None:
    """Move centres that nothing chose to the latents farthest from their own centre, in place."""
    if counts.all():
        return
    errors = (look_up(centres, assigned) - latents).square().sum(dim=-1)  # (tokens, groups)
    for group in range(len(centres)):
        empty = (counts[group] == 0).nonzero().squeeze(1)
        farthest = errors[:, group].sort(descending=True, stable=True).indices[: len(empty)]
        centres[group, empty] = latents[farthest, group]
