"""A Ray session: joins the cluster that is there, or starts a small one on this machine and stops it afterwards.

In: an address, or none. Out: the cluster's resources. The one place that calls ``ray.init``; quiet, without dashboard
or usage statistics, and nothing of the working folder is uploaded: the machines of a cluster have the project
installed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

OBJECT_STORE_BYTES = 200 * 1024 * 1024  # file contents never go through Ray, so a small store will do
START_ATTEMPTS = 3
HEAD_SECONDS = 30.0
KNOCK_SECONDS = 3.0
KNOCK_EVERY = 0.5  # seconds


@contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Yield the resources of a running Ray, e.g. ``{"CPU": 2.0, …}``.

    A session that already runs is used as it is and left running. Otherwise ``address`` is joined ("auto" or
    "ray://…"), and without one a Ray with ``cpus`` CPUs (by default all) is started here and shut down at the end.
    Starting takes about 10 s.

    Raises ``ConnectionError`` if no cluster answers at ``address``, or none could be started.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES alone on CPU tasks
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    with _own_sigterm():
        _init(address, cpus)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _init(address: str | None, cpus: int | None) -> None:
    """Join or start Ray; raises ``ConnectionError``."""
    import ray

    if address is not None:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal() and not _answers((host.strip("[]"), int(port))):  # Ray would try for two minutes
            raise ConnectionError(f"no Ray cluster answers at {address}: give the address that `ray start` printed")
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (RuntimeError, TimeoutError) as error:  # as ConnectionError, which is raised for some of the causes
            raise ConnectionError(f"no Ray cluster answers at {address}: {_first_line(error)}") from error
        return
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
            )
            return
        except Exception as error:  # a machine that is busy for 30 s makes Ray raise no finer class
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise ConnectionError(
                    f"Ray did not start on this machine in {attempt} attempts: {_first_line(error)} Its logs are in "
                    "/tmp/ray/session_latest/logs; try again when the machine has less to do"
                ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the caller's handler of SIGTERM, if it has one: Ray sets its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if callable(before) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


class RayWatch:
    """Tells that the Ray of this process is gone, before a call waits for it in vain.

    Knocks at the ports of this machine's raylet and of the cluster's head (GCS). With ``head_returns`` the head may be
    away for ``HEAD_SECONDS``: some clusters restart theirs. Ray itself would end the process after 60 s.
    """

    def __init__(self, head_returns: bool) -> None:
        import ray

        self._patience = HEAD_SECONDS if head_returns else 0.0
        self._ports: dict[str, tuple[str, int]] = {}
        self._away_since: float | None = None
        self._knocked = 0.0
        if ray.util.client.ray.is_connected():  # "ray://": its calls fail by themselves when the proxy is gone
            return
        context = ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        self._ports["head"] = host.strip("[]"), int(port)
        for node in ray.nodes():
            if node["NodeID"] == context.get_node_id():
                self._ports["raylet"] = node["NodeManagerAddress"], node["NodeManagerPort"]

    def check(self) -> None:
        """Raise ``ConnectionError`` naming what is gone and what would do."""
        if time.monotonic() - self._knocked < KNOCK_EVERY:
            return
        self._knocked = time.monotonic()
        gone = [part for part, place in self._ports.items() if not _answers(place)]
        if not gone:
            self._away_since = None
            return
        if self._away_since is None:
            self._away_since = time.monotonic()
        away = time.monotonic() - self._away_since
        if "raylet" in gone or away >= self._patience:
            host, port = self._ports[gone[-1]]
            raise ConnectionError(
                f"Ray is gone, its {gone[-1]} at {host}:{port} does not answer: start it again if it was yours, and "
                "repeat the command"
            )


def _answers(place: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(place, timeout=KNOCK_SECONDS):
            return True
    except OSError:
        return False
