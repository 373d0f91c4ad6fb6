"""wav2vec 2.0 pretraining: what a micro-batch gives, what padding may not change, and how it learns."""

import math

import pytest
import torch

from pipeline.codebooks import CodebookSync
from pipeline.data.audio import normalise_
from pipeline.models import build_model
from pipeline.quantizers.registry import KINDS as QUANTIZERS
from recipes.schema import load_recipe
from tests.models.speech import LENGTHS, make_batch, tiny_config, tiny_model

KINDS = {
    "ema": {"kind": "ema", "codes": 16},
    "ksom": {"kind": "ksom", "codes": 16, "grid": [4, 4], "groups": 2},
    "ste": {"kind": "ste", "codes": 16},
    "affine": {"kind": "affine", "codes": 16},
    "knn_simplex": {"kind": "knn_simplex", "codes": 8, "neighbours": 2},
    "gumbel": {"kind": "gumbel", "codes": 8, "groups": 2, "dim": 12},
    "identity": {"kind": "identity"},
}


def total(output):
    return torch.stack(list(output.losses.values())).sum()


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZERS if kind != "som"])  # it leaves latents as they are
def test_every_kind_of_a_recipe_trains(kind):
    """As `tessera train speech/wav2vec2_tiny quantizer.kind=…` builds it; no kind is left out."""
    own = {"ksom": {"quantizer.grid": [8, 8]}, "fsq": {"quantizer.codes": 256}}.get(kind, {})
    sizes = {"model.model_dim": 32, "model.layers": 1, "model.ffn_dim": 32}
    start = {"codebooks.initialise": "none"} if kind == "identity" else {}
    recipe = load_recipe("speech/wav2vec2_tiny", {"quantizer.kind": kind} | own | sizes | start)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe.model, recipe.quantizer).train()
    batch = make_batch(recipe.model, [40_000] * 5)  # as many tokens as knn_simplex asks for
    loss = total(model(batch)) / batch.targets
    loss.backward()
    assert torch.isfinite(loss)
    norms = [float(parameter.grad.norm()) for parameter in model.parameters()]
    assert all(math.isfinite(norm) for norm in norms)
    CodebookSync(model).step()
    assert int(model.quantizer.updates) == 1
    assert torch.isfinite(model.quantizer.codebook()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind):
    model = tiny_model(KINDS[kind])
    batch = make_batch(model.config)
    output = model(batch)
    assert output.losses["contrastive"].shape == ()
    assert output.quantizer.codes.shape[0] == batch.targets == int(batch.mask.sum())
    total(output).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    # A bias on all keys adds one term to all of a frame's scores, which softmax cancels: rounding is all it gets.
    dead = [name for name, tensor in model.named_parameters() if not tensor.grad.any() and "k_proj.bias" not in name]
    assert dead == []


def test_layers_left_out_have_a_zero_gradient_and_not_none():
    """ZeRO waits for every parameter's gradient."""
    model = tiny_model(layer_drop=0.9)
    model(make_batch(model.config)).losses["contrastive"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_the_first_loss_is_near_chance():
    model = tiny_model({"kind": "ema", "codes": 64}, logit_temperature=1.0, masking={"negatives": 30})
    batch = make_batch(model.config, [40_000] * 3)
    output = model(batch)
    correct, asked = output.metrics["accuracy"]
    loss, counted = output.metrics["contrastive"]
    assert torch.equal(asked, counted)
    found, drawn = output.metrics["valid_negatives"]
    # A candidate is the positive or a valid distractor; chance is the logarithm of how many there are.
    assert float(loss / counted) == pytest.approx(math.log(1 + 30 * float(found / drawn)), rel=0.1)
    assert float(correct / asked) < 0.25


def test_losses_and_metrics_are_sums_over_targets():
    model = tiny_model(feature_penalty=3.0)
    batch = make_batch(model.config)
    output = model(batch)
    assert set(output.losses) == {"contrastive", "quantizer_commitment", "feature_penalty"}
    torch.testing.assert_close(
        output.losses["quantizer_commitment"], output.quantizer.losses["commitment"] * batch.targets
    )
    _, _, raw = model._features(batch.waveforms, batch.lengths)
    of_clips = [raw[row, :frames].square().mean() for row, frames in enumerate(batch.frame_lengths.tolist())]
    penalty = sum(3.0 * mean * int(batch.mask[row].sum()) for row, mean in enumerate(of_clips))
    torch.testing.assert_close(output.losses["feature_penalty"], penalty)
    _, masked = output.metrics["valid_targets"]
    assert int(masked) == batch.targets
    assert not any(tensor.requires_grad for pair in output.metrics.values() for tensor in pair)


def test_clips_alone_add_up_to_the_batch():
    """Layer-normed convolutions make a clip independent of its neighbours: the sum of three forwards is the joint one,
    in losses, in metrics and in gradients. This is what lets any number of ranks train the same model."""
    options = {"conv_norm": "layer", "norm_order": "pre", "feature_penalty": 5.0}
    together, alone = tiny_model(**options), tiny_model(**options)
    output = together(make_batch(together.config))
    total(output).backward()
    outputs = []
    for length in LENGTHS:
        outputs.append(alone(make_batch(alone.config, [length])))
        total(outputs[-1]).backward()
    for name, loss in output.losses.items():
        torch.testing.assert_close(sum(part.losses[name] for part in outputs), loss, rtol=1e-4, atol=1e-4)
    for name, (numerator, denominator) in output.metrics.items():
        torch.testing.assert_close(sum(part.metrics[name][0] for part in outputs), numerator, rtol=1e-4, atol=1e-4)
        assert sum(part.metrics[name][1] for part in outputs) == denominator
    for (name, parameter), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(
            other.grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_padding_does_not_change_a_clips_features_or_codes():
    model = tiny_model(conv_norm="layer", norm_order="pre").eval()
    batch = make_batch(model.config)
    features = model.extract(batch.waveforms, batch.lengths)
    codes, frames = model.encode_codes(batch)
    assert codes.shape == (*batch.mask.shape, 1)
    assert frames.tolist() == batch.frame_lengths.tolist() == [62, 44, 27]
    for row, length in enumerate(LENGTHS):
        single = make_batch(model.config, [length])
        kept = frames[row]
        expected = model.extract(single.waveforms, single.lengths)
        torch.testing.assert_close(features[row, :kept], expected[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(codes[row, :kept], model.encode_codes(single)[0][0])


def test_the_quantizer_sees_masked_frames_only():
    model = tiny_model()
    batch = make_batch(model.config)
    seen = []
    model.quantizer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(batch)
    features, _, _ = model._features(batch.waveforms, batch.lengths)
    assert torch.equal(seen[0], features[batch.mask])
    assert float(model.quantizer.pending()[0].sum()) == batch.targets


def test_what_is_under_the_mask_does_not_reach_the_context():
    model = tiny_model().eval()
    batch = make_batch(model.config)
    features, layout, _ = model._features(batch.waveforms, batch.lengths)
    other = torch.where(batch.mask.unsqueeze(-1), torch.randn_like(features), features)
    assert torch.equal(model._encode(features, layout, batch.mask), model._encode(other, layout, batch.mask))
    assert not torch.equal(model._encode(features, layout, None), model._encode(other, layout, None))


def test_a_collapsed_codebook_counts_nothing():
    model = tiny_model({"kind": "ema", "codes": 16})
    model.quantizer.set_codebook(torch.zeros(1, 16, 16))
    output = model(make_batch(model.config))
    assert output.losses["contrastive"].item() == 0.0
    for name in ("accuracy", "contrastive", "valid_negatives"):
        assert output.metrics[name][0].item() == 0, name
    assert output.metrics["accuracy"][1].item() == 0
    total(output).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_an_unmasked_batch_gives_zero_and_a_gradient():
    model = tiny_model()
    batch = make_batch(model.config, [1_000])  # 2 frames: too few to mask
    assert batch.targets == 0
    output = model(batch)
    assert total(output).item() == 0.0
    total(output).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dropout_is_torchs_generator_alone():
    """The trainer seeds it from (seed, step, micro-batch): nothing else may draw."""
    model = tiny_model(KINDS["gumbel"], dropout=0.1, attention_dropout=0.1, feature_dropout=0.1, layer_drop=0.3)
    batch = make_batch(model.config)
    losses = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(total(model(batch)).item())
    assert losses[0] == losses[1] != losses[2]


def hard_clips(config):
    """Noise, silence, a constant and a clip driven to the limits, normalised as the loader does or not."""
    batch = make_batch(config, [20_000] * 4)
    batch.waveforms[1] = 0.0
    batch.waveforms[2] = 0.25
    batch.waveforms[3] = torch.sign(torch.sin(torch.arange(20_000) * 0.05))
    return batch


@pytest.mark.parametrize("conv_norm", ["group", "layer"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("kind", ["knn_simplex", "gumbel", "ema"])
def test_silence_and_clipping_train_without_nan(kind, normalised, conv_norm):
    model = tiny_model(KINDS[kind], conv_norm=conv_norm)
    batch = hard_clips(model.config)
    if normalised:
        for waveform in batch.waveforms:
            normalise_(waveform.numpy())
        assert not batch.waveforms[1].any()
    output = model(batch)
    loss = total(output) / batch.targets
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    CodebookSync(model).step()
    assert torch.isfinite(model.quantizer.codebook()).all()


def test_silence_is_no_success():
    """Its frames are alike: none can be told from another, so none counts, where fairseq would count all as right."""
    model = tiny_model({"kind": "ema", "codes": 16}, conv_norm="layer").eval()
    batch = hard_clips(model.config)
    output = model(batch)
    counts = batch.mask.sum(dim=1)
    codes = output.quantizer.codes.split(counts.tolist())
    assert len(codes[1].unique()) == 1
    valid, masked = output.metrics["valid_targets"]
    assert int(masked) == batch.targets
    assert int(valid) <= batch.targets - int(counts[1])
    correct, asked = output.metrics["accuracy"]
    assert int(correct) <= int(asked) == int(valid)


def test_clips_shorter_than_a_frame_are_refused():
    model = tiny_model()
    batch = make_batch(model.config)
    batch.lengths[1] = 399
    with pytest.raises(ValueError, match=r"1 of 3 clips have fewer audio samples, 399 for one, than the 400"):
        model(batch)
    with pytest.raises(ValueError, match=r"leave them out, as data\.min_seconds does"):
        model.extract(batch.waveforms, batch.lengths)


def test_bf16_leaves_objective_penalty_and_codes_in_fp32():
    """Autocast is for the encoder: what is compared, squared and counted is not rounded to bf16."""
    model = tiny_model(KINDS["ema"])
    batch = make_batch(model.config)
    seen = {}
    model.quantizer.register_forward_hook(lambda _, inputs, output: seen.update(latents=inputs[0], output=output))
    with torch.autocast("cpu", torch.bfloat16):
        _, _, raw = model._features(batch.waveforms, batch.lengths)
        output = model(batch)
    assert raw.dtype == torch.bfloat16
    assert {name: loss.dtype for name, loss in output.losses.items()} == dict.fromkeys(output.losses, torch.float32)
    of_clips = [raw[row, :frames].float().square().mean() for row, frames in enumerate(batch.frame_lengths.tolist())]
    penalty = sum(10.0 * mean * int(batch.mask[row].sum()) for row, mean in enumerate(of_clips))
    torch.testing.assert_close(output.losses["feature_penalty"], penalty, rtol=1e-5, atol=0)
    assert seen["output"].losses["commitment"].dtype == torch.float32
    nearest = torch.cdist(seen["latents"].float(), model.quantizer.codebook()[0]).argmin(dim=1)
    assert torch.equal(seen["output"].codes[:, 0], nearest)


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_the_extractors_gradient_is_scaled_and_no_other(scale):
    plain, scaled = tiny_model(), tiny_model(feature_gradient_scale=scale)
    batch = make_batch(plain.config)
    total(plain(batch)).backward()
    total(scaled(batch)).backward()
    for (name, parameter), other in zip(plain.named_parameters(), scaled.parameters(), strict=True):
        factor = scale if name.startswith("frontend.feature_extractor") else 1.0
        torch.testing.assert_close(other.grad, factor * parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_mask_of_other_convolutions_is_refused():
    model = tiny_model()
    shorter = tiny_config(conv_layers=[*model.config.conv_layers, (16, 2, 2)])
    with pytest.raises(ValueError, match=r"mask has shape \(3, 31\), the features \(3, 62\).*conv_layers"):
        model(make_batch(shorter))


def test_it_learns_a_batch_by_heart():
    """Real codebook updates between steps; the targets are the model's own and have to stay apart."""
    torch.manual_seed(0)
    model = tiny_model({"kind": "knn_simplex", "codes": 16, "neighbours": 2}, feature_penalty=0.1)
    batch = make_batch(model.config)
    sync = CodebookSync(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        output = model(batch)
        optimizer.zero_grad()
        (total(output) / batch.targets).backward()
        optimizer.step()
        health = sync.step()
        loss, counted = output.metrics["contrastive"]
        losses.append(float(loss / counted))
    assert losses[0] > 0.8 * math.log(11)
    assert losses[-1] < 0.6 * losses[0]
    assert health.summary()["codebook_usage"] > 0.5


def test_no_compiler_is_called():
    """fairseq2's own quantizer compiles a closure in its first forward, which needs a C++ compiler at run time."""
    torch._dynamo.utils.counters.clear()
    model = tiny_model(KINDS["gumbel"])
    total(model(make_batch(model.config))).backward()
    assert not torch._dynamo.utils.counters["frames"]
