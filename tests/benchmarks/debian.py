"""Debian packages as a source of freely licensed speech and photographs.

In: package names and a cache folder. Out: the folder each package was unpacked into. Needs ``apt-get`` and
``dpkg-deb``, no root; writes only below the cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


class MissingProgram(RuntimeError):
    """A program of the system that this needs and does not have."""


def require(program: str, purpose: str) -> str:
    """Path of ``program``; raises :class:`MissingProgram` naming it and what it is for."""
    found = shutil.which(program)
    if found is None:
        raise MissingProgram(f"{program} is not installed, but {purpose} needs it: install the package that has it")
    return found


def unpack_packages(packages: list[str], cache: Path) -> dict[str, Path]:
    """Download and unpack ``packages`` once; returns where each one lies.

    Raises :class:`MissingProgram` where this is no Debian, and ``RuntimeError`` with apt's own words if a download
    fails.
    """
    apt = require("apt-get", "downloading packages")
    dpkg = require("dpkg-deb", "unpacking packages")
    cache.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}
    for package in packages:
        folder = cache / package
        if not folder.exists():
            if not list(cache.glob(f"{package}_*.deb")):
                print(f"downloading {package}", flush=True)
                _run([apt, "download", "-q", package], cache)
            archive = sorted(cache.glob(f"{package}_*.deb"))[-1]
            unpacking = cache / f"{package}.tmp"
            shutil.rmtree(unpacking, ignore_errors=True)
            _run([dpkg, "--extract", archive.name, str(unpacking.resolve())], cache)
            unpacking.rename(folder)
        folders[package] = folder
    return folders


def _run(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed (try `apt-get update` first):\n{done.stderr.strip()}")
