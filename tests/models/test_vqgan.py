"""VQGAN's net: the losses' weights, what is attended to, and shapes of any multiple of the latents' size."""

import pytest
import torch

from pipeline.models import build_model
from pipeline.models.config import VQGANConfig
from pipeline.models.vqgan import AttentionBlock, SwishBlock
from pipeline.quantizers.ema import EMAConfig
from tests.training.engine_steps import image_batch


def tiny(**changes):
    torch.manual_seed(0)
    sizes = {"channels": 32, "multipliers": (1, 1, 2), "residual_layers": 1, "latent_dim": 6, "net_dim": 8}
    return build_model(VQGANConfig.model_validate(sizes | changes), EMAConfig(codes=12)).train()


def test_codes_alone_give_the_reconstruction():
    model = tiny().eval()
    pixels = torch.rand(2, 3, 16, 24)
    reconstruction, codes = model.reconstruct(pixels)
    assert codes.shape == (2, 4, 6, 1)
    torch.testing.assert_close(model.decode_codes(codes), reconstruction)


@pytest.mark.parametrize(
    ("absolute", "squared", "names"),
    [(1.0, 0.0, {"absolute"}), (0.0, 2.0, {"reconstruction"}), (0.5, 1.0, {"absolute", "reconstruction"})],
)
def test_losses_are_weighted_sums_over_pixels(absolute, squared, names):
    model = tiny(absolute_weight=absolute, squared_weight=squared)
    batch = image_batch(torch.rand(2, 3, 16, 16))
    output = model(batch)
    error = model.decode({"": output.quantizer.vectors}) - (batch.pixels - 0.5) / 0.5
    assert set(output.losses) - {"quantizer_commitment"} == names
    expected = {"absolute": absolute * error.abs().sum(), "reconstruction": squared * error.square().sum()}
    for name in names:
        torch.testing.assert_close(output.losses[name], expected[name])
    assert float(output.metrics["mse"][0] / output.metrics["mse"][1]) == pytest.approx(
        float(error.detach().square().mean()) / 4, rel=1e-4
    )


def test_no_loss_at_all_is_refused():
    with pytest.raises(ValueError, match=r"absolute_weight=0 and squared_weight=0 leave nothing to learn from"):
        VQGANConfig(absolute_weight=0.0, squared_weight=0.0)


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_attention_is_at_the_smallest_levels_and_in_the_middle(levels):
    model = tiny(attention_levels=levels)
    sizes = []
    for module in model.encoder:
        if isinstance(module, AttentionBlock):
            module.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    model(image_batch(torch.rand(1, 3, 16, 16)))
    assert sizes == [8] * (levels > 1) + [4] * (levels > 0) + [4]
    assert sum(isinstance(module, AttentionBlock) for module in model.decoder) == 1 + 2 * levels
    assert len(model.blocks) == sum(isinstance(module, AttentionBlock | SwishBlock) for module in model.modules())


def test_attention_is_softmax_over_all_places():
    torch.manual_seed(0)
    block, features = AttentionBlock(32), torch.randn(2, 32, 3, 5)
    query, key, value = (
        each(block.norm(features)).flatten(2).transpose(1, 2) for each in (block.query, block.key, block.value)
    )
    weights = torch.softmax(query @ key.transpose(1, 2) / 32**0.5, dim=-1)
    expected = features + block.output((weights @ value).transpose(1, 2).reshape(features.shape))
    torch.testing.assert_close(block(features), expected)
