"""A Ray session: joins the cluster that is there, or starts a small one on this machine and stops it afterwards.

In: an address, or none. Out: the cluster's resources. The one place that calls ``ray.init``; quiet, without dashboard
or usage statistics, and nothing of the working folder is uploaded: the machines of a cluster have the project
installed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

OBJECT_STORE_BYTES = 200 * 1024 * 1024  # file contents never go through Ray, so a small store will do


@contextmanager
def ray_session(address: str | None = None, cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Yield the resources of a running Ray, e.g. ``{"CPU": 2.0, …}``.

    A session that already runs is used as it is and left running. Otherwise ``address`` is joined ("auto" or
    "ray://…"), and without one a Ray with ``cpus`` CPUs (by default all) is started here and shut down at the end.
    Starting takes about 10 s.

    Raises ``ConnectionError`` if no cluster answers at ``address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # leave CUDA_VISIBLE_DEVICES alone on CPU tasks
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
