"""The convolutions computed frame by frame: fairseq2's features and gradients, and less kept for the backward pass."""

import copy
import pickle

import pytest
import torch
from fairseq2.models.wav2vec2 import Wav2Vec2Factory

from pipeline.models.convolutions import Convolutions, GeluConvolution, compute_by_frames
from pipeline.models.speech import fairseq2_config
from tests.distributed.harness import run_ranks
from tests.models.speech import make_batch, tiny_config, tiny_model

NORMS = ["group", "layer"]


def both(conv_norm, seed=0):
    """fairseq2's layers, and ours with the same weights; in training mode."""
    torch.manual_seed(seed)
    config = fairseq2_config(tiny_config(conv_norm=conv_norm))
    theirs = Wav2Vec2Factory(config).create_encoder_frontend().feature_extractor.train()
    for name, parameter in theirs.named_parameters():
        if "norm" in name or "bias" in name:  # not ones and zeros, which would hide a mistake
            torch.nn.init.normal_(parameter, 0.5, 0.5)
    ours = copy.deepcopy(theirs)
    compute_by_frames(ours)
    return theirs.layers, ours.layers


def waveforms(clips=3, samples=9_001):
    """Smooth as speech is, off zero, of very different levels."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(clips, 1, samples + 31, generator=generator)
    smooth = torch.nn.functional.avg_pool1d(noise, 32, stride=1)
    return smooth * torch.logspace(-3, 0, clips).view(-1, 1, 1) + 0.1


def gradients(layers, clips, compute=None):
    """Features and each parameter's gradient, for a gradient of the features that is the same for all."""
    features = (compute or layers)(clips)
    wanted = torch.randn(features.shape, generator=torch.Generator().manual_seed(2)).to(features.dtype)
    found = torch.autograd.grad(features, list(layers.parameters()), wanted)
    return {"features": features.detach()} | dict(zip(dict(layers.named_parameters()), found, strict=True))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_its_gradient_is_the_slope(kernel, stride, bias):
    torch.manual_seed(0)
    shapes = [(2, 9, 3), (4, 3, kernel), *[(4,)] * bias]
    x, weight, *others = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def convolve(*inputs):
        return GeluConvolution.apply(*inputs, *[None] * (not bias), stride)

    assert torch.autograd.gradcheck(convolve, (x, weight, *others))
    expected = torch.conv1d(torch.nn.functional.gelu(x.transpose(1, 2)), weight, *others, stride=stride)
    torch.testing.assert_close(convolve(x, weight, *others).transpose(1, 2), expected)


@pytest.mark.parametrize("conv_norm", NORMS)
def test_features_and_gradients_are_fairseq2s(conv_norm):
    """Beside fairseq2's in double precision ours are as near as its own in single precision are, or 1e-5."""
    theirs, ours = both(conv_norm)
    clips = waveforms()
    found, again, plain = gradients(ours, clips), gradients(ours, clips), gradients(theirs, clips)
    exact = gradients(copy.deepcopy(theirs).double(), clips.double())
    for name, wanted in exact.items():
        error, usual = (float((each[name] - wanted).norm() / wanted.norm()) for each in (found, plain))
        assert error <= max(1e-5, 2 * usual), name
        assert torch.equal(found[name], again[name]), f"{name}: a resumed run would be another"
        assert name == "features" or not torch.equal(found[name], plain[name]), "fairseq2's own computation"


@pytest.mark.parametrize("conv_norm", NORMS)
def test_formulas_are_exact(conv_norm):
    """In double precision rounding hides nothing."""
    theirs, ours = (layers.double() for layers in both(conv_norm))
    for layer in (*theirs, *ours):  # fairseq2's norms would go through single precision
        if layer.layer_norm is not None:
            layer.layer_norm.cast_fp32 = False
    if theirs[0].group_norm is not None:
        theirs[0].group_norm.__class__ = torch.nn.GroupNorm
    clips = waveforms(2, 4_000).double()
    found, exact = gradients(ours, clips, ours.by_frames), gradients(theirs, clips)
    for name, wanted in exact.items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12 * float(wanted.norm()), msg=name)


@pytest.mark.parametrize("conv_norm", NORMS)
def test_a_clips_features_are_its_own(conv_norm):
    _, ours = both(conv_norm)
    clips = waveforms()
    together = ours(clips)
    for number, clip in enumerate(clips):
        torch.testing.assert_close(ours(clip.unsqueeze(0))[0], together[number], rtol=1e-5, atol=1e-5)


def test_elsewhere_fairseq2_computes():
    theirs, ours = both("group")
    clips = waveforms()
    with torch.no_grad():
        assert torch.equal(ours(clips), theirs(clips))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(clips), theirs(clips))
    assert torch.equal(ours.bfloat16()(clips.bfloat16()), theirs.bfloat16()(clips.bfloat16()))
    theirs, ours = (layers.eval() for layers in both("group"))
    for name, wanted in gradients(theirs, clips).items():
        assert torch.equal(gradients(ours, clips)[name], wanted), name


def test_parameters_and_their_names_stay():
    theirs, ours = both("group")
    assert list(theirs.state_dict()) == list(ours.state_dict())
    for layers in (tiny_model().frontend.feature_extractor.layers, pickle.loads(pickle.dumps(ours))):
        assert isinstance(layers, Convolutions)
        assert [name for name, _ in layers.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("conv_norm", NORMS)
def test_less_is_kept_for_the_backward_pass(conv_norm):
    def kept(layers):
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            features = layers(waveforms())
        assert features.requires_grad
        return sum(sizes.values())

    theirs, ours = both(conv_norm)
    assert kept(ours) < 0.8 * kept(theirs)


def gradients_in_parts(lengths):
    """Called on each rank: of the extractor, by a ZeRO-3 that leaves no parameter whole outside its module."""
    from pipeline.training.engine import import_deepspeed

    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    model = tiny_model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1 << 20},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1.0), config=config)
    extractor = model.frontend.feature_extractor
    sizes = {parameter.numel() for parameter in extractor.parameters()}
    batch = make_batch(model.config, lengths)
    found = {}
    for _ in range(2):  # from the second on DeepSpeed follows what it has seen in the first
        engine.backward(sum(engine(batch).losses.values()) / batch.targets)
        names = dict(extractor.named_parameters())
        found = {name: deepspeed.utils.safe_get_full_grad(each).clone() for name, each in names.items()}
        engine.optimizer.zero_grad()
    return sizes, found


@pytest.mark.slow
def test_zero_3_brings_the_parameters():
    lengths = [9_000, 9_000]
    model = tiny_model()
    batch = make_batch(model.config, lengths)
    (sum(model(batch).losses.values()) / batch.targets).backward()
    for sizes, found in run_ranks(gradients_in_parts, 2, lengths, timeout=280):
        assert sizes == {0}, "parameters were whole"
        for name, parameter in model.frontend.feature_extractor.named_parameters():
            error = float((found[name] - parameter.grad).norm() / parameter.grad.norm())
            assert error < 1e-5, name
