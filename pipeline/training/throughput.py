"""How fast a run is: samples, seconds of audio, tokens and model FLOPs a second, waiting, and memory.

In: each micro-batch and what the model made of it. Out: numbers for a line of the log, over all ranks. May touch: the
collectives of DeepSpeed's backend, around which it puts a clock, and two small all-reduces for each line.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median_low
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline import collectives
from pipeline.models.base import StepOutput

BACKWARD_OVER_FORWARD = 2
"""FLOPs of a backward over those of its forward: a product of matrices has two gradients. By this convention of MFU
(Chowdhery et al., arXiv 2204.02311, appendix B) activations that are computed twice count once."""

HALF_PRECISION_PEAKS = (
    ("B200", 2250e12),
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 80GB HBM3", 989e12),  # the SXM board
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10", 125e12),
)
"""(words of the device's name, FLOP/s of bf16 and fp16 matrix products), dense, from NVIDIA's data sheets. fp32 has
none: by torch's defaults convolutions are computed in TF32 and matrix products are not, so no one peak bounds both."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    return find_peak(torch.cuda.get_device_name(device))


def find_peak(device_name: str) -> float | None:
    """Half-precision peak by :data:`HALF_PRECISION_PEAKS` of the name that CUDA gives a device."""
    words = f" {device_name} ".replace("-", " ")
    return next((peak for part, peak in HALF_PRECISION_PEAKS if f" {part} " in words), None)


class CollectiveClock:
    """Seconds that this rank's device spends in the engine's collectives: reducing gradients, gathering weights, and
    waiting in them for a slower rank; and in what else is :meth:`timed`.

    Collectives that the engine starts ahead and waits for later, as ZeRO 3 gathers weights, are not counted. On a GPU
    events are recorded around each, and nothing waits for them before :meth:`read`.
    """

    NAMES = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "broadcast")

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []
        self._backend: Any = None

    def __enter__(self) -> CollectiveClock:
        from deepspeed.comm import comm

        self._backend = comm.cdb
        for name in self.NAMES:
            setattr(self._backend, name, self.timed(getattr(self._backend, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.NAMES:
            delattr(self._backend, name)  # the class's own shows again

    def timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """``collective``, counted."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("async_op"):
                return collective(*args, **kwargs)
            if self._cuda:
                began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                began.record()
                result = collective(*args, **kwargs)
                ended.record()
                self._events.append((began, ended))
                return result
            start = time.perf_counter()
            result = collective(*args, **kwargs)
            self._seconds += time.perf_counter() - start
            return result

        return timed

    def read(self) -> float:
        """Seconds since the last call."""
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Throughput:
    """Counts a rank's work between two lines of the log."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self._device = device
        self._peak = peak_flops(device, precision)
        self._flops_a_unit: float | None = None  # a second of speech or an image
        self._clear()

    def _clear(self) -> None:
        self._began = time.perf_counter()
        self._samples, self._audio = 0, 0.0
        self._tokens: Tensor | None = None

    @contextmanager
    def counting_flops(self, batch: Any) -> Iterator[None]:
        """Within the block is the forward of ``batch``; the first one's FLOPs are counted, and stand for all others by
        their seconds or images."""
        if self._flops_a_unit is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops_a_unit = (1 + BACKWARD_OVER_FORWARD) * counter.get_total_flops() / max(_units(batch), 1e-9)

    def add(self, batch: Any, output: StepOutput) -> None:
        """Add one micro-batch."""
        self._samples += len(batch.keys)
        self._audio += getattr(batch, "seconds", 0.0)
        for quantized in (*output.coarser, output.quantizer):
            codes = quantized.codes
            tokens = (codes[..., 0] >= 0).sum() if codes.shape[-1] else torch.zeros((), device=codes.device)
            self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def read(self, data_wait: float, all_reduce: float) -> dict[str, float]:
        """Rates over all ranks since the last call, and the longest data wait, the shortest time in collectives and the
        largest memory of a rank; of several ranks also which took longest for all but the collectives, its seconds and
        those of the middle rank. Called by every rank."""
        seconds = time.perf_counter() - self._began
        own = [0.0] * collectives.world_size()
        own[collectives.rank()] = seconds - all_reduce
        units = self._audio or self._samples
        flops = (self._flops_a_unit or 0.0) * units
        tokens = 0.0 if self._tokens is None else float(self._tokens)
        samples, audio, tokens, flops = _reduce(
            collectives.all_reduce_sum, [self._samples, self._audio, tokens, flops], self._device
        )
        # The rank that others wait for waits least itself: its time is what the exchange takes.
        seconds, data_wait, least, memory, memory_gpu, *own = _reduce(
            collectives.all_reduce_max,
            [seconds, data_wait, -all_reduce, _peak_memory(), self._gpu_memory(), *own],
            self._device,
        )
        values = {
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": tokens / seconds,
            "flops_per_second": flops / seconds,
            "data_wait_share": data_wait / seconds,
            "all_reduce_share": -least / seconds,
            "memory": int(memory),
        }
        if len(own) > 1:
            values |= {
                "slowest_rank": own.index(max(own)),
                "slowest_rank_seconds": max(own),
                "middle_rank_seconds": median_low(own),
            }
        if audio:
            values["audio_per_second"] = audio / seconds
        if self._peak is not None:
            values["flop_utilisation"] = flops / seconds / (self._peak * collectives.world_size())
        if memory_gpu:
            values["memory_gpu"] = int(memory_gpu)
        self._clear()
        return values

    def _gpu_memory(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0


def _units(batch: Any) -> float:
    """What a micro-batch's work is proportional to: seconds of speech, or images."""
    return getattr(batch, "seconds", 0.0) or len(batch.keys)


def _peak_memory() -> int:
    """Most bytes that this process has had in memory at one time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reduce(collective: Callable[[Tensor], Tensor], values: list[float], device: torch.device) -> list[float]:
    return collective(torch.tensor(values, dtype=torch.float64, device=device)).tolist()
