"""The Inception of FID: torchvision's network with other pooling, fed as TensorFlow 1 fed it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models import inception

from pipeline.evaluation.inception import InceptionFeatures, resize
from pipeline.models.given_weights import read_given
from pipeline.models.published import WeightsError


def save_inception(file: Path, classes: int) -> inception.Inception3:
    """A network of random weights, saved in the layout of pytorch-fid (1008 classes) or torchvision (1000)."""
    torch.manual_seed(classes)
    network = inception.Inception3(num_classes=classes, aux_logits=classes == 1000, init_weights=False).eval()
    for name, tensor in network.named_buffers():  # statistics that do something
        if name.endswith("running_mean"):
            tensor.normal_(std=0.1)
    torch.save(network.state_dict(), file)
    return network


class _PoolingOfFid:
    """Stands for torch.nn.functional in torchvision's module: no average counts padding, the ninth is a maximum."""

    def __init__(self) -> None:
        self.calls = 0

    def avg_pool2d(self, x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        self.calls += 1
        if self.calls == 9:
            return functional.max_pool2d(x, kernel_size, stride, padding)
        return functional.avg_pool2d(x, kernel_size, stride, padding, count_include_pad=False)

    def __getattr__(self, name: str) -> object:
        return getattr(functional, name)


def test_features_are_those_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    prepared = (resize((images * 255).round(), 299) - 128) / 128
    results = {}
    for layout, classes in (("torchvision", 1000), ("fid", 1008)):
        file = tmp_path / f"{layout}.pth"
        network = save_inception(file, classes)
        network.fc = torch.nn.Identity()
        features = InceptionFeatures(read_given(file)).train()
        assert features.layout == layout
        with torch.no_grad():
            results[layout] = features(images)
            expected = usual = network(prepared)
            if layout == "fid":
                monkeypatch.setattr(inception, "F", _PoolingOfFid())
                expected = network(prepared)
                assert not torch.allclose(usual, expected, rtol=0.01)
        torch.testing.assert_close(results[layout], expected, rtol=1e-3, atol=1e-5)
        assert results[layout].shape == (1, 2048)


def test_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, file)
    with pytest.raises(WeightsError, match=r"weights\.pth does not hold Inception v3.*pytorch-fid.*torchvision's"):
        InceptionFeatures(read_given(file))
    torch.save({"fc.weight": torch.zeros(1008, 2048), "Mixed_5b.nonsense": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"Inception v3: Conv2d_1a_3x3\.bn\.bias is missing; .* and \d+ more"):
        InceptionFeatures(read_given(file))
    file.write_text("no weights")
    with pytest.raises(WeightsError, match=r"weights\.pth: no checkpoint of torch.save"):
        read_given(file)
    with pytest.raises(WeightsError, match=r"none\.pth: there is no such file"):
        read_given(tmp_path / "none.pth")


def test_images_are_resized_as_tensorflow_did() -> None:
    """Pixel n of the result lies at n · old / new; past the last pixel its value goes on."""
    row = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).expand(1, 1, 2, 2)
    assert resize(row, 4)[0, 0].tolist() == [[0, 0.5, 1, 1]] * 4
    line = torch.arange(6.0).view(1, 1, 1, 6).expand(1, 1, 6, 6)
    assert resize(line, 4)[0, 0, 0].tolist() == [0, 1.5, 3, 4.5]
    assert resize(line.transpose(2, 3), 3)[0, 0, :, 0].tolist() == [0, 2, 4]
    assert torch.equal(resize(line, 6), line)
