"""LPIPS against torchmetrics' network with the same weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchvision import models

from pipeline.models.given_weights import read_given
from pipeline.models.lpips import Lpips
from pipeline.models.published import WeightsError


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_backbone(tmp_path_factory.mktemp("weights") / f"{request.param}.pth")


def save_backbone(file: Path) -> Path:
    """The convolutions of a random network, named by the file, in torchvision's layout; of its classifier a stump."""
    torch.manual_seed(0)
    with torch.device("meta"):
        features = getattr(models, file.stem)(weights=None).features
    state = {}
    for name, tensor in features.state_dict().items():
        value = torch.randn(tensor.shape)
        state[f"features.{name}"] = value * (2 / value[0].numel()) ** 0.5 if value.dim() > 1 else 0.1 * value
    torch.save(state | {"classifier.6.bias": torch.zeros(1000)}, file)
    return file


def reference(backbone: Path) -> _LPIPS:
    """Theirs, with our random network and the heads that they bundle."""
    network = _LPIPS(pretrained=True, net={"alexnet": "alex", "vgg16": "vgg"}[backbone.stem], pnet_rand=True)
    given = torch.load(backbone)
    for part in network.net.children():
        for name, module in part.named_children():
            for kind, parameter in module.named_parameters():
                parameter.data = given[f"features.{name}.{kind}"]
    return network


def pair(side: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, side, side, generator=generator)
    return images, (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def test_distances_are_those_of_torchmetrics(backbone: Path) -> None:
    ours, theirs = Lpips(read_given(backbone)), reference(backbone)
    images, others = pair()
    expected = theirs(images, others, normalize=True).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(ours(images, others), expected, rtol=1e-4, atol=1e-6)
    assert ours(images, images).abs().max() == 0
    assert ours.backbone_sha256 == hashlib.sha256(backbone.read_bytes()).hexdigest()


def test_gradients_reach_images_and_no_weights(backbone: Path) -> None:
    """Also of a black image, where no channel may answer."""
    distance = Lpips(read_given(backbone))
    images, others = pair()
    others[0] = 0
    others.requires_grad_()
    distance(images, others).sum().backward()
    assert others.grad.isfinite().all()
    assert others.grad.flatten(1).abs().sum(1).min() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_other_heads_and_files_are_checked(backbone: Path, tmp_path: Path) -> None:
    given = read_given(backbone)
    own = Lpips(given)
    heads = {f"lin{place}.model.1.weight": 2 * head.weight for place, head in enumerate(own.heads)}
    torch.save(heads, tmp_path / "heads.pth")
    images, others = pair()
    torch.testing.assert_close(
        Lpips(given, read_given(tmp_path / "heads.pth"))(images, others), 2 * own(images, others)
    )
    heads["lin3.model.1.weight"] = torch.zeros(1, 7, 1, 1)
    torch.save(heads, tmp_path / "heads.pth")
    with pytest.raises(WeightsError, match=r"heads\.pth does not hold the LPIPS weights of .*: 3\.weight is \(1, 7"):
        Lpips(given, read_given(tmp_path / "heads.pth"))
    with pytest.raises(WeightsError, match=r"heads\.pth holds neither torchvision's VGG16 nor its AlexNet"):
        Lpips(read_given(tmp_path / "heads.pth"))
    with pytest.raises(ValueError, match=f"at least {own.smallest_side} pixels a side, not 8 × 8"):
        own(*pair(8))
    own(*pair(own.smallest_side))
