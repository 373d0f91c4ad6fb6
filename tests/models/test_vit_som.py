"""ViT-SOM: its net against torch's own layers and the published sizes, its losses, its map, and what it refuses."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from pipeline.data.collation import ImageBatch
from pipeline.models import build_model
from pipeline.models.config import ViTSOMConfig
from pipeline.models.vit_som import Block, sine_positions
from pipeline.quantizers.identity import IdentityConfig
from pipeline.quantizers.som import SOMConfig
from recipes.schema import RecipeError, load_recipe

TINY = {"image_size": 16, "patch": 4, "width": 8, "depth": 2, "heads": 2, "decoder_width": 4, "decoder_depth": 1}
CLASSES = {"task": "classification", "classes": 3}


def tiny(quantizer=None, seed=0, **changes):
    torch.manual_seed(seed)
    quantizer = quantizer or SOMConfig(codes=6, grid=[3, 2], steps=10, weight=0.5)
    model = build_model(ViTSOMConfig(**{**TINY, **changes}), quantizer).train()
    model.quantizer.updates.fill_(5)  # the map's loss has its full weight
    return model


def batch_of(pixels, labels=None):
    keys = [f"image-{place}" for place in range(len(pixels))]
    labels = torch.full((len(pixels),), -1) if labels is None else torch.tensor(labels)
    return ImageBatch(pixels=pixels, labels=labels, keys=keys, step=0, number=0, targets=pixels.numel())


def images(number=3, seed=1):
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_a_block_is_torchs_pre_norm_transformer_layer():
    torch.manual_seed(0)
    ours = Block(12, heads=3)
    torchs = nn.TransformerEncoderLayer(
        12, 3, 48, dropout=0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
    )
    names = {
        "query_key_value.weight": "self_attn.in_proj_weight",
        "query_key_value.bias": "self_attn.in_proj_bias",
        "projection": "self_attn.out_proj",
        "attention_norm": "norm1",
        "mlp_norm": "norm2",
        "mlp.0": "linear1",
        "mlp.2": "linear2",
    }
    state = {}
    for name, tensor in ours.state_dict().items():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        state[name.replace(prefix, names[prefix])] = torch.randn_like(tensor)
        tensor.copy_(state[name.replace(prefix, names[prefix])])
    torchs.load_state_dict(state)
    tokens = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(tokens), torchs(tokens))


def test_positions_are_sines_and_cosines_of_column_and_row():
    positions = sine_positions(3, 8)[0]
    assert positions.shape == (10, 8)
    assert (positions[0] == 0).all(), "the class token has no place"
    column, row = 2, 1
    expected = []
    for place in (column, row):
        angles = torch.tensor([place, place / 100], dtype=torch.float64)
        expected += [*angles.sin(), *angles.cos()]
    torch.testing.assert_close(positions[1 + row * 3 + column], torch.stack(expected).float())


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    # The paper says 2.5 million for 24 × 24, 5.0 for 40 × 40 and 5.4 for classification, whose head of CIFAR-10 and
    # encoder have 5.35, and the map of 4 × 4 units .2 on top.
    [("vit_som_fashion_mnist", 1_820_168), ("vit_som_cifar10", 5_546_890)],
)
def test_published_sizes(recipe, parameters):
    found = load_recipe(recipe)
    with torch.device("meta"):
        model = build_model(found.model, found.quantizer)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_map_of_the_paper_has_5_million_parameters():
    found = load_recipe("vit_som_fashion_mnist", ["quantizer.codes=1600", "quantizer.grid=[40,40]"])
    with torch.device("meta"):
        model = build_model(found.model, found.quantizer)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == 5.0


def test_weights_begin_as_published():
    model = tiny(width=64, heads=4, **CLASSES)
    linear = [module for name, module in model.encoder.named_modules() if isinstance(module, nn.Linear)]
    for layer in linear:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.9 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert (layer.bias == 0).all()
    fan = model.patches.weight[0].numel() + 64
    assert 0.9 * (6 / fan) ** 0.5 < float(model.patches.weight.detach().abs().max()) <= (6 / fan) ** 0.5
    assert float(model.head.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert float(model.class_token.detach().std()) == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_of_clustering(channels):
    model = tiny(channels=channels)
    batch = batch_of(images())
    output = model(batch)
    found = model.infer(batch.pixels)
    expected = (
        batch.pixels if channels == 3 else (batch.pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1)
    )
    torch.testing.assert_close(found.images, expected.reshape(3, channels, 16, 16))
    decoded = model._decode(model._encode(found.images))
    error = decoded - found.images
    torch.testing.assert_close(output.losses["reconstruction"], error.abs().mean() * batch.targets)
    squares, values = output.metrics["mse"]
    torch.testing.assert_close(squares / values, error.detach().square().mean())
    torch.testing.assert_close(output.losses["quantizer_som"], output.quantizer.losses["som"] * batch.targets)
    assert float(output.quantizer.losses["som"].detach()) > 0
    assert found.latents.shape == (3, 16 * 8)
    torch.testing.assert_close(output.quantizer.vectors, found.latents)


def test_the_loss_of_classification():
    model = tiny(**CLASSES, label_smoothing=0.3)
    batch = batch_of(images(), [2, 0, 1])
    output = model(batch)
    logits = model.infer(batch.pixels).logits
    log_shares = logits.log_softmax(dim=1)
    chosen = log_shares[torch.arange(3), batch.labels]
    expected = -(0.7 * chosen + 0.3 * log_shares.mean(dim=1)).mean()
    torch.testing.assert_close(output.losses["classification"].detach(), expected * batch.targets)
    right, number = output.metrics["class_accuracy"]
    assert int(right) == int((logits.argmax(dim=1) == batch.labels).sum())
    assert int(number) == 3
    assert model.decoder is None


def test_classification_sees_normalised_pixels():
    model = tiny(**CLASSES, pixel_mean=[0.1, 0.2, 0.3], pixel_deviation=[0.5, 0.25, 2.0])
    found = model._images(torch.full((1, 3, 16, 16), 0.6))
    assert found[0, :, 0, 0].tolist() == pytest.approx([1.0, 1.6, 0.15])


@pytest.mark.parametrize("changes", [{"channels": 1}, CLASSES])
def test_images_alone_add_up_to_the_batch(changes):
    together, alone = tiny(**changes), tiny(**changes)
    labels = [0, 2, 1] if "classes" in changes else None
    batch = batch_of(images(), labels)
    torch.stack(list(together(batch).losses.values())).sum().backward()
    for row in range(3):
        part = batch_of(batch.pixels[row : row + 1], labels[row : row + 1] if labels else None)
        torch.stack(list(alone(part).losses.values())).sum().backward()
    for (name, parameter), other in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        scale = float(parameter.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(other[1].grad / scale, parameter.grad / scale, rtol=1e-4, atol=1e-5)


def test_the_decoders_values_lie_where_the_patches_were():
    model = tiny(channels=3)
    pixels = images(1)

    class Copy(nn.Module):
        def forward(self, tokens):
            windows = pixels.unfold(2, 4, 4).unfold(3, 4, 4)  # (1, 3, rows, columns, 4, 4)
            return windows.permute(0, 2, 3, 4, 5, 1).reshape(1, 16, 48)

    model.decoder = Copy()
    assert torch.equal(model._decode(torch.zeros(1, 17, 8)), pixels)


def test_codes_are_the_nearest_prototypes_and_decode_to_pictures():
    model = tiny(channels=1).eval()
    batch = batch_of(images())
    codes, tokens = model.encode_codes(batch)
    assert codes.shape == (3, 1, 1, 1)
    assert tokens.tolist() == [1, 1, 1]
    latents = model.infer(batch.pixels).latents
    cosine = nn.functional.normalize(latents) @ nn.functional.normalize(model.quantizer.prototypes.weight[0]).T
    assert torch.equal(codes.flatten(), cosine.argmax(dim=1))
    reconstruction, again = model.reconstruct(batch.pixels)
    assert torch.equal(again, codes)
    assert reconstruction.shape == batch.pixels.shape
    # A prototype in the direction of an image's tokens shows what the decoder makes of them, without a class token.
    with torch.no_grad():
        model.norm.weight.uniform_(0.9, 1.1)
        latents = model.infer(batch.pixels).latents
        model.quantizer.prototypes.weight[0, :3] = 7 * latents
    shown = model.decode_codes(torch.arange(3)[:, None, None, None])
    patches = latents.reshape(3, 16, 8)
    scale = 16**0.5 * model.norm.weight.norm() / latents.norm(dim=1).mean()
    assert scale.item() == pytest.approx(1, abs=0.05)
    without = torch.cat([torch.zeros(3, 1, 8), patches], dim=1)
    torch.testing.assert_close(shown, model._decode(without).clamp(0, 1).expand(-1, 3, -1, -1), rtol=0, atol=0.05)


def test_without_a_map_it_is_a_plain_transformer():
    model = tiny(IdentityConfig(), **CLASSES)
    output = model(batch_of(images(), [0, 1, 2]))
    assert set(output.losses) == {"classification"}


def test_labels_that_are_missing_or_too_many_are_refused():
    model = tiny(**CLASSES)
    with pytest.raises(ValueError, match=r"image-1 has no label: .*`tessera prepare images`"):
        model(batch_of(images(), [0, -1, 2]))
    with pytest.raises(ValueError, match=r"image-2 is of class 3, the net has model.classes=3: use model.classes=4"):
        model(batch_of(images(), [0, 1, 3]))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"images of 12×16 don't fit model.image_size=16"):
        tiny().infer(torch.rand(1, 3, 12, 16))


def test_what_a_task_lacks_is_said():
    with pytest.raises(ValueError, match=r"task=classification has no decoder"):
        tiny(**CLASSES).reconstruct(images())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 3}, "patch=3 does not divide image_size=16: use patch=1, 2, 4, 8"),
        ({"width": 10}, "width=10: two axes with sines and cosines each need a multiple of 4"),
        ({"decoder_width": 12, "heads": 8}, "decoder_width=12: .* heads=8 one of 8"),
        ({"classes": 4}, "classes=4 with task=clustering: leave it out"),
        ({"task": "classification"}, "classes=None with task=classification: give the number of classes"),
        ({"pixel_mean": 0.5}, "pixel_mean and pixel_deviation are for task=classification"),
        ({**CLASSES, "channels": 1, "pixel_mean": [0.5, 0.5, 0.5]}, r"pixel_mean=\[0.5, .* with channels=1: give one"),
        ({**CLASSES, "pixel_deviation": 0.0}, "greater than 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        ViTSOMConfig(**{**TINY, **changes})


def test_the_recipe_joins_map_and_run():
    changes = ["training.steps=900", "schedule.warmup_steps=90"]
    assert load_recipe("vit_som_mnist", changes).quantizer.steps == 900
    assert load_recipe("vit_som_mnist", [*changes, "quantizer.steps=300"]).quantizer.steps == 300
    with pytest.raises(RecipeError, match=r"data.image_size=32 is not model.image_size=28: use one value for both"):
        load_recipe("vit_som_mnist", ["data.image_size=32"])
    with pytest.raises(RecipeError, match=r"quantizer.kind=ema makes vectors that model.kind=vit_som has no use for"):
        load_recipe("vit_som_mnist", ["quantizer.kind=ema"])
    with pytest.raises(RecipeError, match=r"quantizer.kind=som leaves latents as they are, model.kind=autoencoder"):
        load_recipe("autoencoder_tiny_ksom", ["quantizer.kind=som"])
    assert load_recipe("vit_som_cifar10", ["quantizer.kind=identity"]).quantizer.kind == "identity"
