"""How much memory a micro-batch's forward and backward take on a rank, found without computing them.

In: a recipe and the shape of a micro-batch. Out: bytes. Touches nothing but torch's random state, which it brings back.

The recipe's own model runs on *fake* tensors, which know their shape, type and storage but hold no numbers, so that a
model of any size takes a second or two and no memory. What depends on values, such as the choice of codes, needs
numbers: the quantizers keep their real weights and get random latents, and tensors made from nothing, from the
micro-batch or by a quantizer stay real. Each new storage is counted when an operation makes it and until the last
tensor that uses it is gone.

Counted are the tensors that operations give out; what a kernel needs inside itself is not known here.
"""

from __future__ import annotations

import io
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.data.buckets import Buckets
from pipeline.data.config import MAX_BINS, SAMPLE_RATE
from pipeline.data.dataset import Member
from pipeline.data.plan import SampleReference
from pipeline.models import build_collation
from pipeline.quantizers import Quantizer
from pipeline.training.blocks import wrap_blocks

if TYPE_CHECKING:
    from recipes.schema import Recipe

Device = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch on a rank."""

    forward: int
    """Most at one time while the forward runs: what it keeps for the backward, and what it works with."""
    backward: int
    """Most at one time while the backward runs, without the gradients of weights."""
    batch: int
    """The micro-batch itself."""

    @property
    def peak(self) -> int:
        return max(self.forward, self.backward)


def micro_batch_shapes(recipe: Recipe, bins: int = MAX_BINS) -> list[tuple[int, int]]:
    """The micro-batches that may need the most memory, as (samples, length of each): of images their side in pixels; of
    speech audio samples, once for the largest padded sum and once for the longest clips, which attention compares.

    ``bins`` are those of the data's table of lengths: its longest clip is no longer.
    """
    if recipe.batch.seconds is None:
        assert recipe.batch.samples is not None  # the schema wants one of them
        return [(recipe.batch.samples, recipe.data.image_size)]
    buckets = Buckets(recipe.data, recipe.batch.seconds, bins)
    shapes = list(zip(buckets.capacities.tolist(), buckets.padded.tolist(), strict=True))
    return list(dict.fromkeys([max(shapes, key=lambda shape: (shape[0] * shape[1], shape[1])), shapes[-1]]))


def measure_activations(recipe: Recipe, model: nn.Module, shape: tuple[int, int], device: Device) -> Activations:
    """What ``shape``, (samples, length of each), takes; ``model`` is the recipe's, and can't be used otherwise
    afterwards.

    ``device`` decides where kernels differ: a GPU keeps a dropout's mask as a byte a value and none within attention,
    and computes norms in fp32 under autocast (torch's table of autocast operations).
    """
    noise: Any = _Noise(recipe, shape)
    batch = build_collation(recipe)([SampleReference(place, 0, 0, 0) for place in range(shape[0])], noise, 0, 0)
    inputs = [value for field in fields(batch) if isinstance(value := getattr(batch, field.name), Tensor)]
    wrap_blocks(model, recipe.engine.model_copy(update={"compile": False}))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    known = [*_make_fake(model, fake), *inputs]
    for module in model.modules():
        if hasattr(module, "quick"):  # pipeline.models.convolutions, which would import fairseq2 for images too
            module.quick = device == "cpu"  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_forget_gradient)
    precision = torch.float16 if recipe.engine.precision == "fp16" else torch.bfloat16
    half = torch.autocast("cpu", precision, enabled=recipe.engine.precision != "fp32")
    with torch.random.fork_rng(devices=[]), _Storages(fake, known) as storages:
        torch.manual_seed(recipe.seed)
        with half, _GpuKernels(enabled=device == "gpu"):
            losses = model.train()(batch).losses
        forward = storages.read_peak()
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        return Activations(forward, storages.read_peak(), sum(value.nbytes for value in inputs))


class _Storages(TorchDispatchMode):
    """Runs operations with a fake tensor among their inputs on fakes, others as they are; counts the bytes alive."""

    def __init__(self, fake: FakeTensorMode, known: Sequence[Tensor]) -> None:
        super().__init__()
        self._fake = fake
        self._known = known  # kept alive: their addresses are not given to others
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._bytes = self._peak = 0

    def read_peak(self) -> int:
        """Most bytes at one time since the last call."""
        peak, self._peak = self._peak, self._bytes
        return peak

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(value, FakeTensor) for value in tree_leaves((args, kwargs))):
            if operation is torch.ops.aten.index.Tensor:
                args = (args[0], _places(args[1]))
            with self._fake:
                made = operation(*args, **kwargs)
        else:
            made = operation(*args, **kwargs)
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive:
            self._alive[address] = storage.nbytes()
            self._bytes += storage.nbytes()
            self._peak = max(self._peak, self._bytes)
            weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self._bytes -= self._alive.pop(address)


def _places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks of real tensors as the places where they are True, whose number fakes can't know."""
    return [
        place
        for index in indices
        for place in (index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,))
    ]


class _GpuKernels(TorchFunctionMode):
    """Lets a CPU keep what a GPU's kernels keep."""

    def __init__(self, *, enabled: bool) -> None:
        super().__init__()
        self._enabled = enabled

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self._enabled:
            if function is functional.scaled_dot_product_attention:
                kwargs["dropout_p"] = 0.0
            elif function is functional.dropout:
                return _dropout(*args, **kwargs)
            elif function in (functional.layer_norm, functional.group_norm) and torch.is_autocast_enabled("cpu"):
                values = [value.float() if isinstance(value, Tensor) else value for value in args]
                with torch.autocast("cpu", enabled=False):
                    return function(*values, **kwargs)
        return function(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p else input


class _Materialise(torch.autograd.Function):
    """Random numbers in place of fake latents; their gradient is what the fakes' would be."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor) -> Tensor:
        return torch.randn(latents.shape).to(latents.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> list[Tensor]:
    """Put fakes into the place of all weights but the quantizers', which get numbers instead of fake latents from now
    on. Returns all weights, buffers and pending statistics, the fakes among them."""
    real: dict[int, Tensor] = {}
    for quantizer in [module for module in model.modules() if isinstance(module, Quantizer)]:
        quantizer.register_forward_pre_hook(_give_numbers)
        kept = [*quantizer.parameters(), *quantizer.buffers(), *quantizer.pending()]
        real |= {id(tensor): tensor for tensor in kept}
    known, made = list(real.values()), {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in real:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _fake_of(tensor, fake)
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]
    return known + list(made.values())


def _fake_of(tensor: Tensor, fake: FakeTensorMode) -> Tensor:
    found = fake.from_tensor(tensor.detach())
    return nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found


def _give_numbers(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_Materialise.apply(value) if isinstance(value, FakeTensor) else value for value in args)  # type: ignore[no-untyped-call]


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Noise:
    """A data set of noise: as many samples as asked for, all of one length but the last of several, which is shorter:
    padding needs a mask in attention."""

    def __init__(self, recipe: Recipe, shape: tuple[int, int]) -> None:
        self.sources = [self]
        self._samples, self._length = shape
        self._encode: Callable[[int], bytes] = _sound if recipe.data_kind == "speech" else _picture
        self._side = recipe.data.resize or recipe.data.image_size
        self._speech = recipe.data_kind == "speech"

    def keys(self, index: int) -> str:
        return f"noise-{index}"

    def read(self, index: int) -> Member:
        length = self._length if self._speech else self._side
        if self._speech and index and index == self._samples - 1:
            length -= length // 20
        return Member(self.keys(index), self._encode(length), length, 0, b"{}")


def _sound(length: int) -> bytes:
    import soundfile

    file = io.BytesIO()
    noise = np.random.default_rng(0).standard_normal(length).clip(-3, 3) / 4
    soundfile.write(file, noise.astype(np.float32), SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _picture(side: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, format="PNG")
    return file.getvalue()
