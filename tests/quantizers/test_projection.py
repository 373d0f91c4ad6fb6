"""Codes smaller than latents, and codes of length 1: what holds for every kind that has ``codebook_dim`` or
``normalise``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.quantizers import Quantizer, build_quantizer
from pipeline.quantizers.registry import KINDS

DIM = 12
SMALL = 4
CODES = 8


def kinds_with(*options: str) -> list[str]:
    return [kind for kind, (config, _) in KINDS.items() if all(option in config.model_fields for option in options)]


def settable(kind: str) -> bool:
    return KINDS[kind][1].set_codebook is not Quantizer.set_codebook


PROJECTED = kinds_with("codebook_dim", "groups")
NORMALISED = kinds_with("normalise", "codes")


def build(kind: str, **options: Any) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer({"kind": kind, "dim": DIM, "codes": CODES, **options})


def latents(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed))


def project(quantizer: Quantizer, z: Tensor) -> Tensor:
    """By hand: the latents as they are compared with codes, without normalisation."""
    assert quantizer.project_in is not None
    return z @ quantizer.project_in.weight.T + quantizer.project_in.bias


def test_the_kinds_that_are_meant_are_here():
    assert {"ema", "ksom", "gd_som", "ste", "affine", "knn_simplex", "simvq", "rotation"} <= set(PROJECTED)
    assert set(PROJECTED) <= set(NORMALISED)


@pytest.mark.parametrize("kind", PROJECTED)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_shapes(kind, groups, training):
    quantizer = build(kind, codebook_dim=SMALL, groups=groups).train(training)
    out = quantizer(latents(3, 10))
    assert out.vectors.shape == (3, 10, DIM)
    assert out.codes.shape == (3, 10, groups)
    assert quantizer.codebook().shape == (groups, CODES, SMALL // groups)
    assert quantizer.real_latents(latents(7), None).shape == (7, SMALL)
    assert quantizer.encode(latents(2)).shape == (2, groups)


@pytest.mark.parametrize("kind", PROJECTED)
def test_evaluation_gives_the_vectors_of_the_codes_out_of_the_small_space(kind):
    quantizer = build(kind, codebook_dim=SMALL, groups=2).eval()
    z = latents(5, 6)
    out = quantizer(z)
    assert torch.equal(out.codes, quantizer.encode(z))
    torch.testing.assert_close(out.vectors, quantizer.decode(out.codes))
    small = torch.cat([quantizer.codebook()[group][out.codes[..., group]] for group in range(2)], dim=-1)
    torch.testing.assert_close(out.vectors, small @ quantizer.project_out.weight.T + quantizer.project_out.bias)


@pytest.mark.parametrize("kind", [kind for kind in PROJECTED if kind != "knn_simplex"])
def test_codes_are_nearest_in_the_small_space(kind):
    quantizer = build(kind, codebook_dim=SMALL)
    z = latents(50)
    distances = torch.cdist(project(quantizer, z), quantizer.codebook()[0])
    assert torch.equal(quantizer.encode(z)[:, 0], distances.argmin(dim=1))


@pytest.mark.parametrize("kind", PROJECTED)
def test_padding_plays_no_part_and_decodes_to_zeros(kind):
    """The map out has a bias: zeros must not become it."""
    quantizer = build(kind, codebook_dim=SMALL).eval()
    quantizer.project_out.bias.data.fill_(3.0)
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    z = latents(2, 4)
    z[~mask] = float("nan")
    out = quantizer(z, mask)
    assert (out.vectors[~mask] == 0).all()
    assert (quantizer.decode(out.codes)[~mask] == 0).all()
    torch.testing.assert_close(quantizer.decode(out.codes), out.vectors)
    torch.testing.assert_close(out.vectors[mask], quantizer(z[mask]).vectors)


@pytest.mark.parametrize("kind", PROJECTED)
@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_gradients_reach_both_maps_and_the_latents(kind, normalise):
    quantizer = build(kind, codebook_dim=SMALL, normalise=normalise).train()
    z = latents(40).requires_grad_()
    quantizer(z).vectors.square().sum().backward()
    for name in ("project_in", "project_out"):
        for parameter in getattr(quantizer, name).parameters():
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().sum() > 0
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [kind for kind in PROJECTED if "commitment" in KINDS[kind][0].model_fields])
def test_losses_are_measured_in_the_small_space(kind):
    quantizer = build(kind, codebook_dim=SMALL)
    z = latents(40)
    out = quantizer(z)
    small = project(quantizer, z)
    chosen = quantizer.codebook()[0][out.codes[:, 0]]
    torch.testing.assert_close(out.losses["commitment"], 0.25 * (small - chosen).square().mean())


@pytest.mark.parametrize("kind", PROJECTED)
def test_no_token_leaves_every_parameter_in_the_graph(kind):
    """DistributedDataParallel waits for the gradient of each; a rank may have nothing but padding."""
    quantizer = build(kind, codebook_dim=SMALL).train()
    for z in (latents(20), latents(0)):
        quantizer.zero_grad()
        out = quantizer(z)
        (out.vectors.sum() + sum(out.losses.values())).backward()
        missing = [name for name, parameter in quantizer.named_parameters() if parameter.grad is None]
        assert not missing
    assert all(bool((parameter.grad == 0).all()) for parameter in quantizer.parameters())


@pytest.mark.parametrize("kind", [kind for kind in PROJECTED if settable(kind)])
@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_k_means_looks_at_projected_latents(kind, normalise):
    """As many distinct latents as codes, each several times: k-means can only find these."""
    quantizer = build(kind, codebook_dim=SMALL, groups=2, normalise=normalise)
    z = latents(CODES)
    expected = project(quantizer, z).detach().reshape(CODES, 2, SMALL // 2).transpose(0, 1)
    if normalise == "l2":
        expected = functional.normalize(expected, dim=-1)
    before = {name: value.clone() for name, value in quantizer.state_dict().items() if name.startswith("project")}
    initialise_codebooks(quantizer, [z, z.flip(0), z])
    for group in range(2):  # a map lays them in another order
        apart = torch.cdist(expected[group], quantizer.codebook()[group])
        assert float(apart.amin(dim=1).max()) < 1e-4
        assert sorted(apart.argmin(dim=1).tolist()) == list(range(CODES))
    for name, value in before.items():
        assert torch.equal(quantizer.state_dict()[name], value)


@pytest.mark.parametrize("kind", kinds_with("codebook_dim", "codes", "replace_after"))
@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_dead_codes_move_to_projected_latents(kind, normalise):
    quantizer = build(kind, codebook_dim=SMALL, normalise=normalise, replace_after=2, replace_noise=0).train()
    sync = CodebookSync(quantizer)
    z = latents(6) + 4  # to one side: some codes are chosen by none
    for _ in range(2):
        unused = quantizer(z).usage[0] == 0
        replaced = sync.step().quantizers[0].replaced
    assert replaced == int(unused.sum()) > 0
    near = quantizer.real_latents(z, None).detach()
    moved = quantizer.codebook()[0][unused]
    assert float(torch.cdist(moved, near).amin(dim=1).max()) < 1e-4


@pytest.mark.parametrize("kind", PROJECTED)
def test_latents_of_low_precision_and_modules_cast_to_it(kind):
    quantizer = build(kind, codebook_dim=SMALL).eval()
    expected = quantizer(latents(30).bfloat16().float())
    quantizer.bfloat16()
    assert {parameter.dtype for parameter in quantizer.parameters()} <= {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(latents(30).bfloat16())
    assert torch.equal(out.codes, expected.codes)
    torch.testing.assert_close(out.vectors, expected.vectors.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", PROJECTED)
def test_maps_start_as_a_projection_and_are_left_out_where_they_would_do_nothing(kind):
    quantizer = build(kind, codebook_dim=SMALL)
    assert quantizer.project_in is not None
    axes = quantizer.project_in.weight.detach()
    torch.testing.assert_close(axes @ axes.T, torch.eye(SMALL))
    assert torch.equal(quantizer.project_out.weight, axes.T)
    for size in (None, DIM):
        assert build(kind, codebook_dim=size).project_in is None


@pytest.mark.parametrize("kind", PROJECTED)
def test_a_size_that_groups_can_not_share_is_refused(kind):
    with pytest.raises(ValueError, match=r"codebook_dim=5 can't be split into groups=2: use groups=1, 5"):
        build(kind, codebook_dim=5, groups=2)
    with pytest.raises(ValueError, match=r"codebook_dim=0"):
        build(kind, codebook_dim=0)
    assert build(kind, dim=9, codebook_dim=4, groups=2).code_dim == 2  # dim itself need not be shared


@pytest.mark.parametrize("kind", NORMALISED)
@pytest.mark.parametrize("groups", [1, 2])
def test_codes_have_length_1_before_and_after_updates(kind, groups):
    quantizer = build(kind, normalise="l2", groups=groups).train()
    sync = CodebookSync(quantizer)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5) if list(quantizer.parameters()) else None
    ones = torch.ones(groups, CODES)
    before = quantizer.codebook().clone()
    torch.testing.assert_close(before.norm(dim=-1), ones)
    for step in range(3):
        out = quantizer(5 * latents(50, seed=step) + 2)
        if optimizer is not None:
            optimizer.zero_grad()
            (sum(out.losses.values()) + out.vectors.square().sum() / 100).backward()
            optimizer.step()
        sync.step()
        torch.testing.assert_close(quantizer.codebook().norm(dim=-1), ones)
    assert not torch.allclose(quantizer.codebook(), before, atol=1e-4)


@pytest.mark.parametrize("kind", NORMALISED)
def test_the_length_of_latents_does_not_matter(kind):
    quantizer = build(kind, normalise="l2").eval()
    z = latents(40)
    lengths = torch.rand(40, 1, generator=torch.Generator().manual_seed(5)) * 100 + 0.01
    first, second = quantizer(z), quantizer(z * lengths)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.vectors, second.vectors)
    torch.testing.assert_close(first.losses, second.losses)
    torch.testing.assert_close(first.vectors.norm(dim=-1), torch.ones(40))


@pytest.mark.parametrize("kind", NORMALISED)
def test_a_latent_of_zeros_is_quantized_and_gives_finite_gradients(kind):
    quantizer = build(kind, normalise="l2").train()
    z = torch.zeros(3, DIM, requires_grad=True)
    out = quantizer(z)
    assert torch.isfinite(out.vectors).all()
    (out.vectors.sum() + sum(out.losses.values())).backward()
    assert torch.isfinite(z.grad).all()
