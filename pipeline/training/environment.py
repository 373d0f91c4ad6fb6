"""What a run ran on: RUN/environment.json, written at each start.

In: the ranks that exist. Out: library versions, and each rank's host and process id (a supervisor or an operator finds
a rank's process here).
"""

from __future__ import annotations

import json
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline import collectives
from pipeline.data.storage import write_whole

PACKAGES = (
    "tessera",
    "torch",
    "torchaudio",
    "fairseq2",
    "deepspeed",
    "ray",
    "webdataset",
    "numpy",
    "soundfile",
    "transformers",
)


def package_versions() -> dict[str, str]:
    """Installed version of each package that can change a result; "missing" where there is none."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "missing"
    return versions


def write_environment(file: Path) -> None:
    """Gather every rank's host and process id, and let rank 0 write the file. Called by every rank."""
    ranks = collectives.all_gather_objects(
        {"rank": collectives.rank(), "host": socket.gethostname(), "pid": os.getpid()}
    )
    if collectives.rank() == 0:
        values = {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "packages": package_versions(),
            "ranks": ranks,
        }
        write_whole(file, json.dumps(values, indent=1).encode())
