"""Places for a run's workers on a Ray cluster: whether its nodes can hold them, and whether they do.

In: how many workers, and what each needs. Out: a flag, a line in the log now and then, and words for an error. May
touch nothing: it asks Ray's head.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("tessera")

WAIT_LINE_EVERY = 30.0
"""Seconds between lines that tell what is being waited for."""
NODES_SECONDS = 600.0
"""How long a cluster that lost nodes may be too small for the workers, whatever else runs on it."""
JOIN_SECONDS = 60.0
"""How long a cluster that starts may be."""
_LOOK_EVERY = 1.0  # seconds
_LEAVE_SECONDS = 10.0
"""How long the thread's last look may take, unless the head died."""
_CREATED = "CREATED"


class Places:
    """Watches the places of ``workers`` Ray workers, each of which needs ``resources``. A context manager: while it is
    open, a thread looks, since a call to a head that died waits for it. Needs an initialised Ray.

    Attributes: ``taken``, whether the workers have their places now; ``problem``, why they never will, or nothing.
    """

    def __init__(self, workers: int, resources: Mapping[str, float]) -> None:
        self.taken = False
        self.problem = ""
        self._workers, self._resources = workers, dict(resources)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="tessera-ray-places", daemon=True)

    def __enter__(self) -> Places:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(
            _LEAVE_SECONDS
        )  # Ray's session may end next, and this thread's question would start a new one

    def shortage(self) -> str:
        """Why the cluster's nodes could not hold the workers even if nothing else ran there, or nothing."""
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        room = sum(_room(node["Resources"], self._resources) for node in nodes)
        if room >= self._workers:
            return ""
        sizes = (_words({name: node["Resources"].get(name, 0) for name in self._resources}) for node in nodes)
        return f"the nodes of the Ray cluster ({'; '.join(sizes)}) hold {room} of {self}"

    def wait_for_nodes(self, patience: float, given_up: Callable[[], bool]) -> str:
        """Until the cluster has nodes for the workers, busy or not. Returns the shortage that is left after
        ``patience`` seconds, or when the caller has given up."""
        began, told = time.monotonic(), -math.inf
        while shortage := self.shortage():
            now = time.monotonic()
            if now - began >= patience or given_up():
                return shortage
            if now - told >= WAIT_LINE_EVERY:
                told = now
                logger.warning("waiting for nodes to join, up to %.0f s: %s", patience, shortage)
            time.sleep(_LOOK_EVERY)
        return ""

    def __str__(self) -> str:
        return f"{self._workers} workers with {_words(self._resources)} each"

    def _watch(self) -> None:
        since = told = time.monotonic()
        short_since: float | None = None
        while not self._over.wait(_LOOK_EVERY):
            now = time.monotonic()
            try:
                self.taken = _CREATED in _own_groups()
                if self.taken:
                    since = told = now
                    short_since = None
                    continue
                shortage = self.shortage()
                short_since = None if not shortage else short_since or now
                if short_since is not None and now - short_since >= NODES_SECONDS:
                    self.problem = f"{shortage}, since {now - short_since:.0f} seconds: use fewer ranks or add nodes"
                    return
                if now - told >= WAIT_LINE_EVERY:
                    told = now
                    logger.warning(
                        "waiting for places for %s since %.0f s: %s", self, now - since, self._free(shortage)
                    )
            except Exception:  # a head that is away, which another watch tells
                logger.debug("Ray's head does not answer", exc_info=True)

    def _free(self, shortage: str) -> str:
        import ray

        free = ray.available_resources()
        return f"{_words({name: free.get(name, 0) for name in self._resources})} free" + (
            f", {shortage}" * bool(shortage)
        )


def _own_groups() -> list[str]:
    """States of the placement groups of this job."""
    import ray
    from ray.util import placement_group_table

    job = ray.get_runtime_context().get_job_id()
    groups: dict[str, Any] = placement_group_table()
    return [group["state"] for name, group in groups.items() if name.endswith(job)]  # so Ray makes its numbers


def _room(node: Mapping[str, float], worker: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0) // amount) for name, amount in worker.items())


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
