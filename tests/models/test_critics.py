"""LPIPS and the discriminator as losses: neither net learns by the other's loss, and other weights are refused."""

from __future__ import annotations

import functools
import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.models import build_model
from pipeline.models.batch_norm import BatchNorm, NormSync
from pipeline.models.config import SQVAEConfig, VQGANConfig, VQVAE2Config
from pipeline.models.critics import PatchDiscriminator, PerceptualLoss, adversarial_losses
from pipeline.models.given_weights import read_given
from pipeline.models.image_config import DiscriminatorConfig, PerceptualConfig
from pipeline.models.lpips import Lpips
from pipeline.models.published import WeightsError
from pipeline.quantizers.ema import EMAConfig
from pipeline.training.checkpoint import read_weights
from pipeline.training.run_folder import Run
from recipes.schema import load_recipe
from tests.conftest import SMALL_IMAGE
from tests.distributed.harness import run_ranks
from tests.models.test_lpips import save_backbone
from tests.training.engine_steps import build, image_batch, joined, take_all

SMALL = DiscriminatorConfig(weight=0.3, start_step=5, channels=4, layers=2)


@pytest.fixture
def nets() -> tuple[nn.Module, PatchDiscriminator, Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1), PatchDiscriminator(SMALL), torch.randn(3, 3, 16, 16)


def gradients(module: nn.Module) -> list[Tensor | None]:
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return found


def test_each_net_has_the_gradient_of_its_own_loss_alone(nets: tuple[nn.Module, PatchDiscriminator, Tensor]) -> None:
    """To the last bit what two optimisers would see, one after the other."""
    generator, discriminator, images = nets
    sum(adversarial_losses(discriminator, SMALL, images, generator(images), step=5).values()).backward()
    together = gradients(generator), gradients(discriminator)

    (-0.3 * discriminator(generator(images)).mean()).backward()
    of_generator = gradients(generator)
    assert any(each.abs().sum() > 0 for each in gradients(discriminator))  # which must not be learned by

    real, fake = discriminator(images), discriminator(generator(images).detach())
    (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
    assert gradients(generator) == [None, None]
    for found, expected in zip(together, (of_generator, gradients(discriminator)), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_before_its_step_the_discriminator_is_not_heard(nets: tuple[nn.Module, PatchDiscriminator, Tensor]) -> None:
    generator, discriminator, images = nets
    losses = adversarial_losses(discriminator, SMALL, images, generator(images), step=4)
    assert {name: loss.item() for name, loss in losses.items()} == {"adversarial": 0.0, "discriminator": 0.0}
    losses["discriminator"].backward()
    assert all(each is not None and not each.any() for each in gradients(discriminator))
    assert gradients(generator) == [None, None]


def test_the_discriminator_learns_and_the_generator_hears_it() -> None:
    """Of noise and its blurred twin: the discriminator tells them apart, and the generator's loss says so."""
    torch.manual_seed(1)
    config = DiscriminatorConfig(channels=8, layers=2)
    discriminator = PatchDiscriminator(config)
    optimiser = torch.optim.Adam(discriminator.parameters(), 2e-3, betas=(0.5, 0.9))
    for _ in range(40):
        images = torch.randn(8, 3, 16, 16)
        fake = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
        losses = adversarial_losses(discriminator, config, images, fake, step=0)
        optimiser.zero_grad()
        losses["discriminator"].backward()
        optimiser.step()
    assert losses["discriminator"] < 0.3
    assert losses["adversarial"] > 0.8 * 0.5
    assert all(norm.pending()[-1] == 120 for norm in discriminator.modules() if isinstance(norm, BatchNorm))
    NormSync(discriminator).step()


def test_patches_are_seventy_pixels_and_the_layers_those_of_taming() -> None:
    discriminator = PatchDiscriminator(DiscriminatorConfig())
    shapes = [tuple(layer.weight.shape[:2]) for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert shapes == [(64, 3), (128, 64), (256, 128), (512, 256), (1, 512)]
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 2_765_633
    image = torch.zeros(1, 3, 256, 256, requires_grad=True)
    scores = discriminator.eval()(image)
    assert scores.shape == (1, 1, 30, 30)
    convolutions = nn.Sequential(*(layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)))
    convolutions(image)[0, 0, 15, 15].backward()
    touched = image.grad.abs().sum(dim=(0, 1)).nonzero()
    assert (touched.amax(0) - touched.amin(0) + 1).tolist() == [70, 70]


def test_small_images_and_partitioned_weights_are_refused(nets: tuple[nn.Module, PatchDiscriminator, Tensor]) -> None:
    _, discriminator, images = nets
    small = images[..., :11, :]
    with pytest.raises(ValueError, match=r"11 × 16 are too small .* use images of 12 pixels"):
        adversarial_losses(discriminator, SMALL, small, small, step=5)
    discriminator.layers[0].weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"engine\.zero_stage=3 .* use engine\.zero_stage=2"):
        adversarial_losses(discriminator, SMALL, images, images, step=0)


def test_the_perceptual_loss_is_lpips_by_the_recipe_s_files(tmp_path: Path) -> None:
    file = save_backbone(tmp_path / "alexnet.pth")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    loss = PerceptualLoss(PerceptualConfig(network=file, sha256=sha256, weight=0.5))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    others = (images * 0.9).requires_grad_()
    value = loss(images, others)
    assert value.item() == pytest.approx(0.5 * Lpips(read_given(file))(images, others).mean().item())
    value.backward()
    assert others.grad.abs().sum() > 0
    other = PerceptualLoss(PerceptualConfig(network=file, sha256="0" * 64))
    with pytest.raises(WeightsError, match=rf"has sha256 {sha256}, not model\.perceptual\.sha256=0000"):
        other(images, others)


STAGES = (0, 2)
ADVERSARY = {"channels": 4, "layers": 2}


@functools.cache
def runs(ranks: int) -> list[Any]:
    cases = [
        ("image", {"zero_stage": stage, "gradient_clipping": 0}, 2, {"discriminator": ADVERSARY}) for stage in STAGES
    ]
    return run_ranks(take_all, ranks, cases, timeout=280)


@pytest.mark.parametrize("place", range(len(STAGES)))
def test_any_number_of_ranks_trains_the_same_two_nets(place: int) -> None:
    alone, several = runs(1)[0][place], [rank[place] for rank in runs(2)]
    moments = joined(several, "exp_avg")
    expected = joined([alone], "exp_avg")
    assert sum(name.startswith("critics.discriminator") for name in expected) == 10
    for name, moment in expected.items():
        if moment.numel() == 1:  # the last bias: of scores between -1 and 1 the real's and the fake's gradients cancel
            assert float(moment.abs().max()) < 1e-8
            continue
        assert moment.abs().max() > 0
        torch.testing.assert_close(moments[name], moment, rtol=1e-3, atol=1e-4 * float(moment.abs().max()))
    losses = {key: value for rank in several for key, value in rank["losses"].items()}
    assert losses == pytest.approx(alone["losses"], rel=1e-4)


def test_losses_are_asked_for_in_training_and_are_of_the_mean_of_a_value() -> None:
    plain, judged = build("image"), build("image", discriminator=ADVERSARY | {"weight": 0.5})
    judged.load_state_dict(plain.state_dict(), strict=False)
    batch = image_batch(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    losses = judged(batch).losses
    assert losses.keys() - plain(batch).losses.keys() == {"adversarial", "discriminator"}
    images = judged._normalise(batch.pixels)
    scores = judged.critics.discriminator(judged.decode(judged_vectors(judged, images)))
    assert losses["adversarial"].item() == pytest.approx(-0.5 * scores.mean().item() * batch.targets, rel=1e-4)
    assert not judged.eval()(batch).losses.keys() & {"adversarial", "discriminator"}
    assert not any(name.startswith("critics") for name in plain.state_dict())


@pytest.mark.parametrize(
    "config",
    [
        SQVAEConfig(latent_dim=8, residual_layers=1, discriminator=ADVERSARY),
        VQVAE2Config(channels=8, residual_channels=4, latent_dim=8, discriminator=ADVERSARY),
        VQGANConfig(
            channels=32, multipliers=(1, 1), residual_layers=1, net_dim=8, latent_dim=8, discriminator=ADVERSARY
        ),
    ],
    ids=lambda config: config.kind,
)
def test_every_autoencoder_may_have_them(config: Any) -> None:
    model = build_model(config, EMAConfig(codes=8)).train()
    losses = model(image_batch(torch.rand(2, 3, 16, 16))).losses
    assert losses["discriminator"] > 0
    losses["adversarial"].backward()
    assert all(parameter.grad is None for parameter in model.critics.parameters())
    assert any(parameter.grad is not None for parameter in model.parameters())


def judged_vectors(model: Any, images: Tensor) -> dict[str, Tensor]:
    return {level: output.vectors for level, output in model.quantize(images).items()}


def _train(run: Path, overrides: list[str]) -> None:
    from pipeline.training import train

    train(load_recipe("image/autoencoder_tiny_ksom", overrides), run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_both_critics_resumes_to_the_last_bit(image_dataset: Path, tmp_path: Path) -> None:
    """From the step before the discriminator begins; the network of LPIPS is in no checkpoint and read anew."""
    network = save_backbone(tmp_path / "alexnet.pth")
    overrides = [
        *SMALL_IMAGE,
        f"data.path={image_dataset}",
        "batch.micro_batches=2",
        "training.steps=6",
        "training.checkpoint_every=2",
        "model.discriminator.channels=4",
        "model.discriminator.start_step=3",
        f"model.perceptual.network={network}",
        f"model.perceptual.sha256={hashlib.sha256(network.read_bytes()).hexdigest()}",
    ]
    run_ranks(_train, 2, tmp_path / "whole", overrides, timeout=400)
    whole, resumed = Run(tmp_path / "whole"), Run(tmp_path / "resumed")
    log = {line["step"]: line for line in whole.log()}
    assert [log[step]["loss_discriminator"] > 0 for step in sorted(log)] == [False] * 3 + [True] * 3
    assert all(line["loss_perceptual"] > 0 for line in log.values())
    shutil.copytree(whole.path, resumed.path)
    for checkpoint in resumed.list_checkpoints()[1:]:
        shutil.rmtree(checkpoint)
    run_ranks(_train, 2, resumed.path, overrides, timeout=400)
    expected, found = (read_weights(run.latest_checkpoint()) for run in (whole, resumed))
    assert resumed.latest_checkpoint().name == "step-00000006"
    assert any(name.startswith("critics.discriminator") for name in expected)
    assert not any("perceptual" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    network.unlink()
    whole.load_model()  # needs no network
