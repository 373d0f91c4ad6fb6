"""The image autoencoder: shapes, units of its losses, and that it can learn images by heart."""

import pytest
import torch

from pipeline.codebooks import CodebookSync, initialise_codebooks
from pipeline.data import ImageBatch, ImageCollation, SampleReference, ShardedDataset
from pipeline.data.config import DataConfig
from pipeline.models import build_model
from pipeline.models.config import AutoencoderConfig
from pipeline.quantizers.ema import EMAConfig
from pipeline.quantizers.ksom import KSOMConfig


def tiny(quantizer=None, **changes):
    torch.manual_seed(0)
    sizes = {"channels": 16, "residual_channels": 8, "residual_layers": 1, "latent_dim": 12}
    config = AutoencoderConfig.model_validate(sizes | changes)
    return build_model(config, quantizer or EMAConfig(codes=16, groups=2)).train()


def batch_of(pixels):
    names = [f"image-{row}" for row in range(len(pixels))]
    return ImageBatch(pixels, torch.full((len(pixels),), -1), names, 0, 0, pixels.numel())


@pytest.fixture(scope="module")
def photographs(image_dataset):
    """Eight real photographs at 32 × 32."""
    collation = ImageCollation(DataConfig(image_size=32), seed=0, augment=False)
    dataset = ShardedDataset(image_dataset)
    return collation([SampleReference(index * 30, 0) for index in range(8)], dataset)


@pytest.mark.parametrize(("downsampling", "side"), [(1, 12), (2, 6), (3, 3)])
def test_shapes(downsampling, side):
    model = tiny(downsampling=downsampling).eval()
    batch = batch_of(torch.rand(3, 3, 24, 24))
    reconstruction, codes = model.reconstruct(batch.pixels)
    assert reconstruction.shape == batch.pixels.shape
    assert reconstruction.min() >= 0
    assert reconstruction.max() <= 1
    assert codes.shape == (3, side, side, 2)
    assert codes.dtype == torch.int64
    encoded, tokens = model.encode_codes(batch)
    assert torch.equal(encoded, codes)
    assert tokens.tolist() == [side * side] * 3


def test_codes_alone_give_the_reconstruction():
    model = tiny().eval()
    reconstruction, codes = model.reconstruct(torch.rand(2, 3, 16, 16))
    torch.testing.assert_close(model.decode_codes(codes), reconstruction)


@pytest.mark.parametrize("deviation", [0.5, 0.25])
def test_the_loss_is_on_normalised_pixels_and_the_metric_on_pixels(deviation):
    model = tiny(pixel_mean=0.4, pixel_deviation=deviation)
    batch = batch_of(torch.rand(2, 3, 16, 16))
    output = model(batch)
    decoded = model.decode({"": output.quantizer.vectors}) * deviation + 0.4  # not clipped
    error = (decoded - batch.pixels).square().sum()
    squares, values = output.metrics["mse"]
    assert int(values) == batch.targets == 2 * 3 * 16 * 16
    torch.testing.assert_close(squares, error.detach(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(output.losses["reconstruction"], error / deviation**2, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        output.losses["quantizer_commitment"], output.quantizer.losses["commitment"] * batch.targets
    )


def test_a_net_in_bf16_is_measured_against_the_pixels_themselves():
    """And not against pixels rounded to bf16, which are off by up to half a grey level."""
    model = tiny().to(torch.bfloat16)
    batch = batch_of(torch.randint(0, 256, (2, 3, 16, 16)) / 255)
    output = model(batch)
    decoded = model.decode({"": output.quantizer.vectors}).float() * 0.5 + 0.5
    error = (decoded - batch.pixels).square().sum().detach()
    torch.testing.assert_close(output.metrics["mse"][0], error, rtol=1e-5, atol=0)


def test_images_alone_add_up_to_the_batch():
    together, alone = tiny(), tiny()
    batch = batch_of(torch.rand(3, 3, 16, 16))
    output = together(batch)
    torch.stack(list(output.losses.values())).sum().backward()
    for row in range(3):
        part = alone(batch_of(batch.pixels[row : row + 1]))
        torch.stack(list(part.losses.values())).sum().backward()
    for (name, parameter), other in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        scale = float(parameter.grad.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(other[1].grad / scale, parameter.grad / scale, rtol=1e-4, atol=1e-5)
    for expected, actual in zip(together.quantizer.pending(), alone.quantizer.pending(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_size_that_cannot_be_halved_is_refused():
    with pytest.raises(ValueError, match=r"images of 18×20 can't be halved 2 times.*multiple of 4"):
        tiny()(batch_of(torch.rand(1, 3, 18, 20)))


def test_it_learns_eight_photographs_by_heart(photographs):
    """From 64 tokens each. One that learns only the images' mean colours keeps their whole variance."""
    model = tiny(KSOMConfig(codes=64, grid=[8, 8]), channels=32)
    initialise_codebooks(model, [photographs], method="kmeans")
    sync = CodebookSync(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        output = model(photographs)
        optimizer.zero_grad()
        (torch.stack(list(output.losses.values())).sum() / photographs.targets).backward()
        optimizer.step()
        sync.step()
    reconstruction, codes = model.eval().reconstruct(photographs.pixels)
    variance = photographs.pixels.var(dim=(2, 3), correction=0).mean()
    assert (reconstruction - photographs.pixels).square().mean() < 0.15 * variance
    assert len(codes.unique()) > 32
