"""What holds for every kind of quantizer: shapes, masks, when state changes, precision, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import Quantizer, QuantizerOutput, build_quantizer
from pipeline.quantizers.registry import KINDS

DIM = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "identity": {"kind": "identity"},
    "ema": {"kind": "ema", "codes": 8},
    "ema_groups": {"kind": "ema", "codes": 5, "groups": 3, "update_empty": False, "replace_after": 2},
    "ksom": {"kind": "ksom", "codes": 8, "grid": [4, 2]},
    "ksom_gaussian_groups": {"kind": "ksom", "codes": 8, "groups": 2, "neighbourhood": "gaussian"},
    "gd_som": {"kind": "gd_som", "codes": 8, "grid": [4, 2]},
    "gd_som_exponential_groups": {"kind": "gd_som", "codes": 8, "groups": 2, "neighbourhood": "exponential"},
    "som": {"kind": "som", "codes": 8, "grid": [4, 2], "steps": 10},
    "som_hexagonal": {"kind": "som", "codes": 8, "grid": [4, 2], "steps": 10, "topology": "hexagonal"},
    "som_manhattan": {"kind": "som", "codes": 8, "steps": 10, "distance": "manhattan"},
    "som_euclidean": {"kind": "som", "codes": 8, "steps": 10, "distance": "euclidean"},
    "ste": {"kind": "ste", "codes": 8, "sync_nu": 0.5},
    "ste_l2_groups": {"kind": "ste", "codes": 8, "groups": 2, "normalise": "l2", "replace_after": 2},
    "ste_max_norm": {"kind": "ste", "codes": 8, "normalise": "max_norm"},
    "affine_learned": {"kind": "affine", "codes": 8, "affine": "learned", "affine_groups": 2},
    "affine_running_groups": {"kind": "affine", "codes": 8, "groups": 2, "affine": "running"},
    "gumbel": {"kind": "gumbel", "codes": 5, "groups": 2},
    "simvq": {"kind": "simvq", "codes": 8},
    "simvq_l2_groups": {"kind": "simvq", "codes": 8, "groups": 3, "normalise": "l2"},
    "rotation": {"kind": "rotation", "codes": 8},
    "rotation_l2_groups": {"kind": "rotation", "codes": 8, "groups": 2, "normalise": "l2", "replace_after": 2},
    "fsq_groups": {"kind": "fsq", "levels": [3, 4, 3], "groups": 4},
    "lfq_groups": {"kind": "lfq", "codes": 8, "groups": 4},
    "lfq_spherical": {"kind": "lfq", "codes": 4096, "spherical": True, "commitment": 0.25},
    "residual": {"kind": "residual", "codes": 8, "levels": 3, "level": {"replace_after": 2}},
    "residual_ste": {"kind": "residual", "codes": 8, "levels": 2, "level": {"kind": "ste", "sync_nu": 0.5}},
    "knn_softmax": {"kind": "knn_simplex", "codes": 5},
    "knn_gumbel_linear": {"kind": "knn_simplex", "codes": 5, "groups": 2, "sampler": "gumbel", "logits": "linear"},
    "knn_distance_l2": {"kind": "knn_simplex", "codes": 5, "logits": "distance", "distance": "l2"},
}
SAMPLING = {"gumbel", "knn_gumbel_linear"}  # training draws
BESIDE = {name for name, options in OPTIONS.items() if options["kind"] == "som"}  # vectors are the latents
NAMES = list(OPTIONS)


def _build(name: str) -> Quantizer:
    torch.manual_seed(0)
    return build_quantizer({"dim": DIM, **OPTIONS[name]})


def _latents(*shape: int) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(1))


def _total(out: QuantizerOutput) -> Tensor:
    return sum(out.losses.values(), out.vectors.new_zeros(()))


def _pending(quantizer: Quantizer) -> list[Tensor]:
    """Of the quantizer, or of those that it is made of."""
    parts = [module for module in quantizer.modules() if isinstance(module, Quantizer)]
    return [tensor.clone() for part in parts for tensor in part.pending()]


def _joined(quantizer: Quantizer, vectors: list[Tensor]) -> Tensor:
    """The vectors that the codes of the groups make up."""
    return sum(vectors, torch.zeros(())) if quantizer.config.kind == "residual" else torch.cat(vectors, dim=-1)


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _assert_equal(first: dict[str, Tensor] | list[Tensor], second: dict[str, Tensor] | list[Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_every_kind_is_here():
    assert {options["kind"] for options in OPTIONS.values()} == KINDS.keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_shapes_and_types(name, training):
    quantizer = _build(name).train(training)
    latents = _latents(2, 3, 4)
    out = quantizer(latents)
    assert (out.vectors.shape, out.vectors.dtype) == ((2, 3, 4, DIM), torch.float32)
    assert (out.codes.shape, out.codes.dtype) == ((2, 3, 4, quantizer.groups), torch.int64)
    assert (out.usage.shape, out.usage.dtype) == ((quantizer.groups, quantizer.codes), torch.float32)
    code_dim = DIM if OPTIONS[name]["kind"] == "residual" else DIM // quantizer.groups
    assert quantizer.codebook().shape == (quantizer.groups, quantizer.codes, code_dim)
    assert quantizer.codebook().dtype == torch.float32
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in out.losses.values())
    assert all(metric.shape == () and not metric.requires_grad for metric in out.metrics.values())
    if quantizer.codes:
        assert 0 <= int(out.codes.min()) <= int(out.codes.max()) < quantizer.codes
        assert out.usage.sum(dim=1).tolist() == [24.0] * quantizer.groups
        for group in range(quantizer.groups):
            counts = torch.bincount(out.codes[..., group].reshape(-1), minlength=quantizer.codes)
            assert torch.equal(out.usage[group], counts.float())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_gives_the_vectors_of_the_codes(name):
    quantizer = _build(name).eval()
    latents = _latents(5, 6)
    out = quantizer(latents)
    assert torch.equal(out.codes, quantizer.encode(latents))
    if name in BESIDE:
        assert torch.equal(out.vectors, latents)
    elif quantizer.codes:
        torch.testing.assert_close(out.vectors, quantizer.decode(out.codes), rtol=0, atol=0)
    if quantizer.codes:
        rows = [quantizer.codebook()[group][out.codes[..., group]] for group in range(quantizer.groups)]
        torch.testing.assert_close(quantizer.decode(out.codes), _joined(quantizer, rows), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_padding_plays_no_part(name, training):
    """Masked tokens may hold anything: the real ones give what they give alone."""
    mask = torch.tensor([[True, True, False, True], [False, False, True, False]])
    latents = _latents(2, 4)
    latents[~mask] = float("nan")
    alone, padded = _build(name).train(training), _build(name).train(training)
    torch.manual_seed(2)
    expected = alone(latents[mask])
    torch.manual_seed(2)
    out = padded(latents, mask)
    assert torch.equal(out.codes[mask], expected.codes)
    assert (out.codes[~mask] == -1).all()
    assert torch.equal(out.vectors[mask], expected.vectors)
    assert (out.vectors[~mask] == 0).all()
    _assert_equal(out.losses, expected.losses)
    assert torch.equal(out.usage, expected.usage)
    _assert_equal(_pending(padded), _pending(alone))
    assert torch.equal(padded.encode(latents, mask)[mask], padded.encode(latents[mask]))


@pytest.mark.parametrize("name", NAMES)
def test_only_padding_costs_nothing_and_keeps_the_graph(name):
    quantizer = _build(name).train()
    sync = CodebookSync(quantizer)
    before = _state(quantizer)
    latents = _latents(2, 3).requires_grad_()
    out = quantizer(latents, torch.zeros(2, 3, dtype=torch.bool))
    assert float(_total(out).detach()) == 0.0
    assert (out.codes == -1).all()
    (_total(out) + out.vectors.sum()).backward()
    assert latents.grad is not None
    assert (latents.grad == 0).all()
    assert all(parameter.grad is None or bool((parameter.grad == 0).all()) for parameter in quantizer.parameters())
    sync.step()
    after = _state(quantizer)
    for steps in [key for key in before if key.endswith("updates")]:
        assert int(after.pop(steps)) == int(before.pop(steps)) + 1
    _assert_equal(after, before)


@pytest.mark.parametrize("name", NAMES)
def test_forward_changes_nothing_but_pending_statistics(name):
    quantizer = _build(name).train()
    before = _state(quantizer)
    for _ in range(3):
        quantizer(_latents(4, 5))
    _assert_equal(_state(quantizer), before)
    if quantizer.codes:
        usage = [tensor for tensor in _pending(quantizer) if tensor.shape[1:] == (quantizer.codes,)]
        assert torch.cat(usage).sum(dim=1).tolist() == [60.0] * quantizer.groups


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_encoding_and_decoding_change_nothing_at_all(name):
    quantizer = _build(name).train()
    quantizer(_latents(4, 5))
    pending, state = _pending(quantizer), _state(quantizer)
    codes = quantizer.encode(_latents(2, 2))  # in training mode too
    quantizer.eval()
    quantizer(_latents(4, 5))
    quantizer.encode(_latents(4, 5))
    if quantizer.codes:
        quantizer.decode(codes)
    _assert_equal(_pending(quantizer), pending)
    _assert_equal(_state(quantizer), state)


@pytest.mark.parametrize("name", NAMES)
def test_accumulated_micro_batches_pend_what_one_batch_does(name):
    if name in SAMPLING:
        pytest.skip("draws depend on the shape of the batch")
    together, in_parts = _build(name).train(), _build(name).train()
    latents = _latents(30)
    together(latents)
    for part in latents.split([7, 1, 22]):
        in_parts(part)
    if name == "affine_running_groups":  # moments of the codes are counted by forward
        _, sums, forwards, moments = in_parts.pending()
        torch.testing.assert_close(sums, together.pending()[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moments / forwards, together.pending()[3])
    else:
        torch.testing.assert_close(_pending(in_parts), _pending(together), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_are_counted_once(name, reentrant):
    plain, recomputed = _build(name).train(), _build(name).train()

    def total(quantizer: Quantizer, latents: Tensor) -> Tensor:
        out = quantizer(latents)
        return out.vectors.square().sum() + _total(out)

    torch.manual_seed(3)
    first = _latents(4, 5).requires_grad_()
    total(plain, first).backward()
    torch.manual_seed(3)
    second = _latents(4, 5).requires_grad_()
    checkpoint(total, recomputed, second, use_reentrant=reentrant).backward()
    _assert_equal(_pending(recomputed), _pending(plain))
    torch.testing.assert_close(second.grad, first.grad)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "double"])
def test_state_stays_fp32(name, cast):
    quantizer = _build(name).train()
    quantizer(_latents(40))
    CodebookSync(quantizer).step()
    before = _state(quantizer)
    wrapped = nn.Sequential(quantizer)
    wrapped.to(torch.bfloat16) if cast == "to" else getattr(wrapped, cast)()
    _assert_equal(_state(quantizer), before)
    assert {tensor.dtype for tensor in quantizer.buffers()} <= {torch.float32, torch.int64, torch.bool}


@pytest.mark.parametrize("name", NAMES)
def test_low_precision_latents_are_compared_in_fp32(name):
    quantizer = _build(name).eval()
    latents = _latents(50).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(latents)
    expected = quantizer(latents.float())
    assert out.vectors.dtype == torch.bfloat16
    assert torch.equal(out.codes, expected.codes)
    assert all(loss.dtype == torch.float32 for loss in out.losses.values())
    _assert_equal(out.losses, expected.losses)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_goes_on_where_it_was_taken(name, tmp_path):
    first, second = _build(name).train(), build_quantizer({"dim": DIM, **OPTIONS[name]}).train()
    first(_latents(40))
    CodebookSync(first).step()
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    syncs = CodebookSync(first), CodebookSync(second)
    assert syncs[0].checksum() == syncs[1].checksum()
    for step in range(3):
        for quantizer, sync in zip((first, second), syncs, strict=True):
            torch.manual_seed(step)
            quantizer(_latents(20 + step))
            sync.step()
    _assert_equal(_state(second), _state(first))
    assert int(first.updates) == 4


@pytest.mark.parametrize("name", NAMES)
def test_bad_latents_are_refused_and_change_nothing(name):
    quantizer = _build(name).train()
    quantizer(_latents(10))
    pending, state = _pending(quantizer), _state(quantizer)
    latents = _latents(2, 3)
    for value in (float("nan"), float("inf")):
        broken = latents.clone()
        broken[1, 2, 0] = value
        for call in (quantizer, quantizer.encode):
            with pytest.raises(ValueError, match="1 of 6 latents hold NaN or infinity"):
                call(broken)
    with pytest.raises(ValueError, match=r"\(2, 3, 11\).*12"):
        quantizer(latents[..., :11])
    with pytest.raises(ValueError, match=r"mask.*\(2, 4\).*\(2, 3\)"):
        quantizer(latents, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask.*torch\.float32.*torch\.bool"):
        quantizer(latents, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"torch\.int64"):
        quantizer(torch.ones(2, DIM, dtype=torch.int64))
    _assert_equal(_pending(quantizer), pending)
    _assert_equal(_state(quantizer), state)


@pytest.mark.parametrize("name", NAMES)
def test_bad_latents_give_no_number_where_a_trainer_skips_the_step(name):
    quantizer = _build(name).train()
    quantizer.spoils_infinite = True
    sync, state = CodebookSync(quantizer), _state(quantizer)
    latents = _latents(2, 3)
    latents[1, 2, 0] = float("inf")
    latents.requires_grad_()
    output = quantizer(latents)
    assert output.vectors.isnan().all()
    assert all(loss.isnan() for loss in output.losses.values())
    assert ((output.codes >= 0) | (quantizer.codes == 0)).all()
    output.vectors.sum().backward()
    assert not torch.isfinite(latents.grad).all()
    sync.discard()
    assert not quantizer._pending
    _assert_equal(_state(quantizer), state)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "identity"])
def test_decoding_knows_padding_and_refuses_what_is_no_code(name):
    quantizer = _build(name)
    codes = torch.zeros(2, 3, quantizer.groups, dtype=torch.int64)
    codes[0, 1] = -1
    vectors = quantizer.decode(codes)
    assert (vectors[0, 1] == 0).all()
    torch.testing.assert_close(vectors[1, 2], _joined(quantizer, list(quantizer.codebook()[:, 0])))
    for wrong in (quantizer.codes, -2):
        codes[0, 0, 0] = wrong
        with pytest.raises(ValueError, match=str(wrong)):
            quantizer.decode(codes)
    with pytest.raises(ValueError, match="groups"):
        quantizer.decode(codes[..., :1].expand(2, 3, quantizer.groups + 1))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_latents(name):
    quantizer = _build(name).train()
    latents = _latents(16).requires_grad_()
    out = quantizer(latents)
    out.vectors.sum().backward()
    assert latents.grad is not None
    assert torch.isfinite(latents.grad).all()
    assert latents.grad.abs().sum() > 0


def test_statistics_of_another_layout_are_refused():
    quantizer = _build("ema").train()
    quantizer(_latents(10))
    pending = _pending(quantizer)
    with pytest.raises(ValueError, match="statistics have shapes"):
        quantizer.apply_update(pending[:1])
    _assert_equal(_pending(quantizer), pending)


def test_identity_passes_latents_on_and_has_nothing_to_decode():
    quantizer = _build("identity").train()
    latents = _latents(3, 4)
    out = quantizer(latents)
    assert torch.equal(out.vectors, latents)
    assert out.losses == {}
    assert quantizer.pending() == []
    with pytest.raises(ValueError, match="identity has no codes to decode"):
        quantizer.decode(out.codes)
