"""The loader of a rank: its micro-batches, decoded ahead of the training step by threads.

In: a data set, a plan, a collation, the rank's place in the world. Out: an iterator over optimiser steps. Holds no
state that a checkpoint would need: what it gives at step ``t`` depends on ``t`` alone, whatever was read or restarted
before.

Threads and no worker processes: the decoders release the interpreter's lock, and a clip that crosses a process border
costs more than decoding it. A thread makes a whole micro-batch: to share one among threads would give none more to do.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import chain, islice
from threading import Lock
from typing import Any

from pipeline.data.collation import Collation, SampleError
from pipeline.data.config import SAMPLE_RATE, BatchConfig
from pipeline.data.dataset import ShardedDataset
from pipeline.data.mixing import Data
from pipeline.data.plan import SampleReference, SamplingPlan

logger = logging.getLogger(__name__)

WAIT_LINE_EVERY = 30.0  # seconds between lines that tell what is being waited for


class TooManyBadSamples(RuntimeError):
    """More samples fail to decode than the run accepts."""


class Loader(Iterator[list[Any]]):
    """Iterates over optimiser steps; each item is the list of this rank's micro-batches ``rank, rank + world_size, …``.

    Attributes: ``wait_seconds``, time that the consumer spent waiting; ``bad``, the key and reason of each sample that
    failed to decode and was replaced by the plan's next one. ``close()`` stops the threads; so does running out of
    steps, or leaving a ``with`` block.
    """

    def __init__(
        self,
        dataset: Data,
        plan: SamplingPlan,
        collation: Collation,
        *,
        rank: int,
        world_size: int,
        start_step: int,
        prefetch: int,
        steps: int | None,
        threads: int,
        max_bad: int,
    ) -> None:
        micro_batches = plan.batch.micro_batches
        if micro_batches % world_size:
            raise ValueError(
                f"batch.micro_batches={micro_batches} can't be shared by {world_size} ranks: "
                "use a number of ranks that divides it"
            )
        self.dataset = dataset
        self.plan = plan
        self.collation = collation
        self.wait_seconds = 0.0
        self.bad: dict[str, str] = {}
        self._numbers = range(rank, micro_batches, world_size)
        self._next_step = start_step
        self._end = None if steps is None else start_step + steps
        # Memory is bounded by what is decoded ahead; with less than a micro-batch a thread, some would have no work.
        self._prefetch = max(prefetch, math.ceil(threads / len(self._numbers)))
        self._max_bad = max_bad
        self._counting = Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tessera-decode")
        self._ahead: deque[list[Future[Any]]] = deque()
        self._in_work: dict[tuple[int, int], list[str]] = {}  # step and micro-batch → keys, none until it is planned

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Any]:
        self._fill()
        if not self._ahead:
            self.close()
            raise StopIteration
        began = time.perf_counter()
        try:
            item = [self._await(future) for future in self._ahead.popleft()]
        except BaseException:
            self.close()
            raise
        self.wait_seconds += time.perf_counter() - began
        self._fill()
        return item

    def _await(self, future: Future[Any]) -> Any:
        """The future's result; a wait that lasts is told in the log, with what is being read."""
        began = time.monotonic()
        while not wait([future], timeout=WAIT_LINE_EVERY).done:
            logger.warning("waiting for data since %.0f s: %s", time.monotonic() - began, self._describe_work())
        return future.result()

    def _describe_work(self) -> str:
        """The micro-batches that the threads are at."""
        lines = []
        for (step, number), keys in sorted(self._in_work.copy().items()):
            samples = ", ".join(keys[:5]) + (", …" if len(keys) > 5 else "") or "not known yet"
            lines.append(f"step {step}, micro-batch {number} (samples {samples})")
        return "; ".join(lines)

    def _fill(self) -> None:
        while len(self._ahead) < self._prefetch and (self._end is None or self._next_step < self._end):
            step = self._next_step
            self._ahead.append([self._pool.submit(self._load, step, number) for number in self._numbers])
            self._next_step += 1

    def _load(self, step: int, number: int) -> Any:
        self._in_work[step, number] = []
        try:
            return self._decode(step, number)
        finally:
            del self._in_work[step, number]

    def _decode(self, step: int, number: int) -> Any:
        planned = self.plan.micro_batch(step, number)
        references = list(planned)
        attempts = dict.fromkeys(range(len(planned)), 0)
        self._in_work[step, number] = [
            self.dataset.sources[reference.source].keys(reference.index) for reference in planned
        ]
        while True:
            try:
                return self.collation(references, self.dataset, step, number)
            except SampleError as error:
                self._count(error)
                place = references.index(error.reference)
                attempts[place] += 1
                replacement = self.plan.replacement(planned[place], attempts[place])
                if replacement is None:
                    raise TooManyBadSamples(
                        f"no sample of a whole window of {self.dataset.path} can be decoded: {error}"
                    ) from error
                references[place] = replacement

    def _count(self, error: SampleError) -> None:
        with self._counting:
            if error.key not in self.bad:
                self.bad[error.key] = error.reason
                logger.warning("%s; the plan's next sample takes its place", error)
            if len(self.bad) > self._max_bad:
                keys = ", ".join(list(self.bad)[:5])
                raise TooManyBadSamples(
                    f"{len(self.bad)} samples of {self.dataset.path} can't be decoded, data.max_bad={self._max_bad} "
                    f"are accepted ({keys}, …): run `tessera verify {self.dataset.path}`"
                ) from error

    def close(self) -> None:
        """Stop decoding; what was decoded ahead is dropped, and what a thread is at is waited for."""
        running = [future for futures in self._ahead for future in futures if not future.cancel()]
        self._ahead.clear()
        self._end = self._next_step
        for future in running:
            with suppress(Exception):  # it would have been raised when its turn came
                self._await(future)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_loader(
    dataset: Data,
    plan: SamplingPlan,
    collation: Collation,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    prefetch: int | None = None,
    steps: int | None = None,
    threads: int | None = None,
    max_bad: int | None = None,
) -> Loader:
    """The loader of ``rank``, from ``start_step`` on, for ``steps`` steps or without end.

    ``prefetch`` steps are decoded ahead by ``threads`` threads; neither changes a bit of what comes out. They and
    ``max_bad`` default to the plan's data configuration. Raises ``ValueError`` if ``world_size`` does not divide the
    plan's micro-batches.
    """
    return Loader(
        dataset,
        plan,
        collation,
        rank=rank,
        world_size=world_size,
        start_step=start_step,
        prefetch=plan.data.prefetch if prefetch is None else prefetch,
        steps=steps,
        threads=plan.data.threads if threads is None else threads,
        max_bad=plan.data.max_bad if max_bad is None else max_bad,
    )


def epoch_batches(
    dataset: ShardedDataset,
    collation: Collation,
    batch: BatchConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    threads: int = 2,
    prefetch: int = 4,
) -> Iterator[Any]:
    """Every sample of the split exactly once, whole and in order, for evaluation and tokenisation.

    Speech is cut into batches of at most ``batch.seconds`` padded seconds, but a longer clip comes alone; images come
    ``batch.samples`` at a time, the last batch with what is left. Of several ranks, each gets every ``world_size``-th
    batch. A sample that can't be decoded raises :class:`SampleError`: an evaluation that left it out would not be
    comparable.
    """
    batches = islice(_cut_in_order(dataset, batch), rank, None, world_size)
    with ThreadPoolExecutor(threads, thread_name_prefix="tessera-decode") as pool:
        ahead: deque[Future[Any]] = deque()
        for number, references in enumerate(batches):
            ahead.append(pool.submit(collation, references, dataset, 0, rank + number * world_size))
            if len(ahead) > prefetch:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _cut_in_order(dataset: ShardedDataset, batch: BatchConfig) -> Iterator[Sequence[SampleReference]]:
    if dataset.kind == "image":
        if batch.samples is None:
            raise ValueError("batch.samples is missing: images are read so many at a time")
        for first in range(0, len(dataset), batch.samples):
            yield [SampleReference(index, 0) for index in range(first, min(first + batch.samples, len(dataset)))]
        return
    if batch.seconds is None:
        raise ValueError("batch.seconds is missing: speech is read so many padded seconds at a time")
    cap = batch.seconds * SAMPLE_RATE
    references: list[SampleReference] = []
    longest = 0
    by_shard = (dataset.shard_lengths(shard).tolist() for shard in range(len(dataset.shard_starts) - 1))
    for index, length in enumerate(chain.from_iterable(by_shard)):
        if references and (len(references) + 1) * max(longest, length) > cap:
            yield references
            references, longest = [], 0
        references.append(SampleReference(index, 0))
        longest = max(longest, length)
    if references:
        yield references
