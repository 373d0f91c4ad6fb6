"""Where pending statistics lie between steps; what a step does with them on several ranks is in tests/distributed."""

import copy

import torch
from torch import nn

from pipeline.codebooks import CodebookSync
from pipeline.quantizers import build_quantizer


def build():
    torch.manual_seed(0)
    return nn.ModuleList(
        [
            build_quantizer({"kind": "ema", "dim": 4, "codes": 5, "groups": 2}),
            build_quantizer({"kind": "ksom", "dim": 6, "codes": 9}),
        ]
    )


def latents(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, 4, generator=generator), torch.randn(40, 6, generator=generator)


def train(model, sync, seed):
    for quantizer, part in zip(model, latents(seed), strict=True):
        quantizer(part)
    return sync.step()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_from_the_first_step_on_statistics_lie_in_one_flat_tensor():
    model = build()
    sync = CodebookSync(model)
    train(model, sync, 0)
    storages = {tensor.untyped_storage().data_ptr() for quantizer in model for tensor in quantizer.pending()}
    assert len(storages) == 1


def test_nothing_of_a_step_is_left_for_the_next():
    model = build()
    sync = CodebookSync(model)
    train(model, sync, 0)
    assert not any(bool(tensor.any()) for quantizer in model for tensor in quantizer.pending())
    before = state(model)
    sync.step()  # no tokens came
    after = state(model)
    for name in before:
        assert name.endswith("updates") or torch.equal(before[name], after[name])


def test_a_second_sync_takes_what_is_pending_with_it():
    alone, handed_over = build(), build()
    sync = CodebookSync(alone)
    for seed in range(3):
        train(alone, sync, seed)
    first = CodebookSync(handed_over)
    train(handed_over, first, 0)
    for quantizer, part in zip(handed_over, latents(1), strict=True):
        quantizer(part)
    CodebookSync(handed_over).step()
    train(handed_over, first, 2)  # and back again
    assert_same(state(handed_over), state(alone))


def test_a_copy_has_statistics_of_its_own():
    model = build()
    sync = CodebookSync(model)
    train(model, sync, 0)
    copied = copy.deepcopy(model)
    for quantizer, part in zip(copied, latents(1), strict=True):
        quantizer(part)
    assert not any(bool(tensor.any()) for quantizer in model for tensor in quantizer.pending())
    CodebookSync(copied).step()
    train(model, sync, 1)
    assert_same(state(copied), state(model))
