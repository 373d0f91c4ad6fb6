"""An image classifier with quantized features: first half of a net → quantizer → second half → classes.

ResNet-18, AlexNet and ViT-T as Huh et al. use them (arXiv 2305.08842, section 5), with torchvision's layers. In: images
in [0, 1] with labels. Out: logits, codes of the features, and the losses of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import alexnet, resnet18

from pipeline.data.collation import ImageBatch
from pipeline.models.base import StepOutput, quantizer_losses, quantizer_metrics
from pipeline.models.batch_norm import BatchNorm
from pipeline.models.classifier_config import ClassifierConfig
from pipeline.models.vit_som import EPSILON, Block, sine_positions
from pipeline.quantizers import Quantizer

TOP = 5


class Classifier(nn.Module):
    """Images to classes through codes; loss: cross-entropy, a mean over images, plus the quantizer's."""

    pixel_mean: Tensor
    pixel_deviation: Tensor

    def __init__(self, config: ClassifierConfig, quantizer: Quantizer) -> None:
        super().__init__()
        self.config = config
        halves = {"resnet18": _resnet_halves, "alexnet": _alexnet_halves, "vit": _vit_halves}
        self.encoder, self.head = halves[config.architecture](config)
        self.quantizer = quantizer
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(config.pixel_deviation).view(3, 1, 1), persistent=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """Layers that may be computed twice, and compiled."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def forward(self, batch: ImageBatch) -> StepOutput:
        """Losses and metrics of one micro-batch. Raises ValueError for an image without a class of the net's."""
        labels = batch.classes(self.config.classes)
        output = self.quantizer(self._features(batch.pixels))
        logits = self._classify(output.vectors)
        loss = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        return StepOutput(
            losses={"classification": loss * batch.targets} | quantizer_losses(output, batch.targets),
            metrics=accuracies(logits.detach(), labels) | quantizer_metrics(output),
            quantizer=output,
        )

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """``pixels (batch, 3, height, width)`` in [0, 1] → logits ``(batch, classes)``."""
        return self._classify(self.quantizer(self._features(pixels)).vectors)

    @torch.no_grad()
    def encode_codes(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        """Codes ``(batch, h, w, groups)`` int64, of a ViT ``(batch, 1, tokens, groups)`` with the class token first;
        and how many tokens each image has, ``(batch,)``."""
        codes = self.quantizer.encode(self._features(batch.pixels))
        return codes, torch.full((len(codes),), codes.shape[1] * codes.shape[2], dtype=torch.int64)

    def _features(self, pixels: Tensor) -> Tensor:
        """→ what is quantized, channels last: ``(batch, h, w, channels)``, of a ViT ``(batch, 1, tokens, dim)``."""
        images = ((pixels - self.pixel_mean) / self.pixel_deviation).contiguous(memory_format=torch.channels_last)
        features = self.encoder(images.to(next(self.head.parameters()).dtype))
        return features.permute(0, 2, 3, 1) if features.ndim == 4 else features.unsqueeze(1)

    def _classify(self, vectors: Tensor) -> Tensor:
        """→ logits ``(batch, classes)`` fp32."""
        transformer = self.config.architecture == "vit"
        return self.head(vectors.squeeze(1) if transformer else vectors.permute(0, 3, 1, 2)).float()


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Share of images whose class is the first guess, and among the first :data:`TOP` if there are more classes, as
    (sum, images)."""
    number = torch.tensor(float(len(labels)), device=logits.device)
    guesses = logits.topk(min(TOP, logits.shape[1]), dim=1).indices == labels[:, None]
    found = {"class_accuracy": (guesses[:, 0].sum(), number)}
    if logits.shape[1] > TOP:
        found["class_accuracy_top5"] = (guesses.any(dim=1).sum(), number)
    return found


def _resnet_halves(config: ClassifierConfig) -> tuple[nn.Module, nn.Module]:
    net = resnet18(num_classes=config.classes, norm_layer=BatchNorm)
    first = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2)
    return first, nn.Sequential(net.layer3, net.layer4, net.avgpool, nn.Flatten(), net.fc)


def _alexnet_halves(config: ClassifierConfig) -> tuple[nn.Module, nn.Module]:
    net = alexnet(num_classes=config.classes, dropout=0.5 if config.dropout is None else config.dropout)
    return net.features, nn.Sequential(net.avgpool, nn.Flatten(), net.classifier)


def _vit_halves(config: ClassifierConfig) -> tuple[nn.Module, nn.Module]:
    first = Tokens(config)
    classes = nn.Linear(config.width, config.classes)
    blocks = [Block(config.width, config.heads) for _ in range(config.depth - config.quantize_after)]
    head = nn.Sequential(*blocks, nn.LayerNorm(config.width, eps=EPSILON), ClassToken(), classes)
    for module in [*first.modules(), *head.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.normal_(classes.weight, std=0.02)
    return first, head


class Tokens(nn.Module):
    """Images ``(batch, 3, height, width)`` → tokens ``(batch, 1 + patches, width)``, the class token first, through the
    blocks before the quantizer. Positions are fixed."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.blocks = nn.Sequential(*(Block(config.width, config.heads) for _ in range(config.quantize_after)))
        nn.init.normal_(self.class_token, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images)
        if images.shape[-1] % self.patches.stride[0] or images.shape[-1] != images.shape[-2]:
            raise ValueError(
                f"images of {images.shape[-2]} × {images.shape[-1]} are no whole square of patches of "
                f"{self.patches.stride[0]}: use data.image_size a multiple of model.patch"
            )
        positions = sine_positions(patches.shape[-1], patches.shape[1]).to(patches)
        tokens = patches.flatten(start_dim=2).transpose(1, 2)  # (batch, patches, width)
        return self.blocks(torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + positions)


class ClassToken(nn.Module):
    """Tokens ``(batch, tokens, width)`` → the first of each image, ``(batch, width)``."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens[:, 0]
