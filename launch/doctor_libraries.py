"""The probes of `tessera doctor` that load heavy libraries; each runs in a process of its own.

In: the name of one probe as the only argument. Out: one JSON object a finding on stdout, as the fields of
:class:`launch.doctor.Finding`. A library that can't be loaded is a finding; one that kills the process shows in its
exit code.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from launch.doctor import GIBIBYTE, REINSTALL, Finding


def probe_torch() -> list[Finding]:
    """GPUs, CUDA and which library carries the collectives."""
    import torch

    driver = Path("/dev/nvidiactl").exists()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        cards = ", ".join(f"{card.name} {card.total_memory / GIBIBYTE:.0f} GiB" for card in properties)
        gpus = Finding("GPUs", "ok", f"{len(properties)}: {cards}; CUDA {torch.version.cuda}")
    elif driver:
        advice = f"see the driver in `nvidia-smi`: torch {torch.__version__} needs one for CUDA {torch.version.cuda}"
        detail = "an NVIDIA driver is here, torch can't use it: training runs on the CPU"
        gpus = Finding("GPUs", "notice", detail, advice)
    else:
        gpus = Finding("GPUs", "ok", "none: training runs on the CPU")
    wanted = "nccl" if torch.cuda.is_available() else "gloo"
    there = {"nccl": torch.distributed.is_nccl_available, "gloo": torch.distributed.is_gloo_available}[wanted]()
    if there:
        return [gpus, Finding("collectives", "ok", wanted)]
    return [gpus, Finding("collectives", "problem", f"torch {torch.__version__} was built without {wanted}", REINSTALL)]


def probe_speech() -> list[Finding]:
    """soundfile, its libsndfile, and fairseq2, which finds libsndfile only once soundfile has loaded it."""
    import soundfile

    library = f"soundfile {soundfile.__version__} with {soundfile.__libsndfile_version__}"
    missing = {"FLAC", "WAV", "OGG"} - set(soundfile.available_formats())
    if missing:
        advice = f"recordings in these formats will be quarantined; {REINSTALL}"
        sound = Finding("sound", "notice", f"{library} can't read {', '.join(sorted(missing))}", advice)
    else:
        sound = Finding("sound", "ok", library)
    try:
        import fairseq2
        import fairseq2.models.wav2vec2  # the encoder that the recipes build
    except Exception as error:
        return [sound, Finding("fairseq2", "problem", f"can't be loaded: {_first_line(error)}", REINSTALL)]
    return [sound, Finding("fairseq2", "ok", f"{fairseq2.__version__} loads after soundfile")]


def probe_deepspeed() -> list[Finding]:
    """DeepSpeed as the trainer starts it: a process group of one rank and one all-reduce through it."""
    import torch

    from pipeline.collectives import all_reduce_sum
    from pipeline.training.engine import import_deepspeed, join_process_group

    deepspeed = import_deepspeed()
    version = f"{deepspeed.__version__}"
    try:
        device = join_process_group(timeout_seconds=20)
        total = all_reduce_sum(torch.ones(1, device=device))
    except Exception as error:
        advice = (
            f"the host name {socket.gethostname()!r} must resolve to this machine (see /etc/hosts), "
            "or name the network interface in GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME with GPUs)"
        )
        return [Finding("DeepSpeed", "problem", f"{version} can't make a process group: {_first_line(error)}", advice)]
    if total.item() != 1.0:
        detail = f"{version}: an all-reduce of 1 on one rank gave {total.item()}"
        return [Finding("DeepSpeed", "problem", detail, REINSTALL)]
    return [Finding("DeepSpeed", "ok", f"{version} on {device.type}, process group of one rank works")]


def probe_ray() -> list[Finding]:
    """The Ray cluster that `tessera` would use: RAY_ADDRESS, one running on this machine, or none yet."""
    import ray

    from pipeline.ray_session import ray_session

    address = os.environ.get("RAY_ADDRESS") or _running_cluster()
    if not address:
        return [Finding("Ray", "ok", f"{ray.__version__}, no cluster runs: commands start one on this machine")]
    advice = (
        "start it (`ray start --head` there), give this machine the cluster's token if it asks for one, "
        "or unset RAY_ADDRESS to use this machine alone"
    )
    try:
        if address != "auto":
            _check_port(address)
        with ray_session(address) as resources:
            nodes = [node for node in ray.nodes() if node["Alive"]]
    except Exception as error:
        return [Finding("Ray", "problem", f"the cluster at {address} can't be used: {_first_line(error)}", advice)]
    place = "a cluster runs here (join it with --ray-address auto)" if address == "auto" else f"cluster at {address}"
    held = f"nodes {len(nodes)}, CPUs {resources.get('CPU', 0):g}, GPUs {resources.get('GPU', 0):g}"
    return [Finding("Ray", "ok", f"{ray.__version__}, {place}: {held}")]


def _running_cluster() -> str | None:
    """ "auto", Ray's word for the cluster on this machine, if one left its address and still answers."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    if not note.is_file():
        return None
    try:
        _check_port(note.read_text().strip())
    except (OSError, ValueError):
        return None
    return "auto"


def _check_port(address: str) -> None:
    """Raise OSError unless something listens at ``address``: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    with socket.create_connection((host or "127.0.0.1", int(port)), timeout=3):
        pass


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


PROBES: dict[str, Callable[[], list[Finding]]] = {
    "torch": probe_torch,
    "speech": probe_speech,
    "deepspeed": probe_deepspeed,
    "ray": probe_ray,
}


def main(name: str) -> None:
    """Run the probe and print its findings."""
    try:
        findings = PROBES[name]()
    except Exception as error:
        findings = [Finding(name, "problem", f"can't be loaded: {_first_line(error)}", REINSTALL)]
    for finding in findings:
        print(json.dumps(dataclasses.asdict(finding)), flush=True)
    # Skips the libraries' own clean-up, which may print or crash after everything is said.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
