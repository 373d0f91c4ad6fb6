"""What a Ray cluster has, node by node and between its nodes: `tessera doctor --cluster`.

In: the cluster's address. Out: a :class:`launch.doctor.Finding` for each node and for what they have together:
versions, clocks, and all-reduces between ranks that meet as training's do. Ends in bounded time; a node that does not
answer is a finding. Under torchrun, Slurm or a hostfile there is no Ray to ask: `tessera doctor` on each node looks at
what that one has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.doctor import REINSTALL, Finding

ANSWER_SECONDS = 60.0
"""How long a node may take to start a process that answers."""
MEETING_SECONDS = 60.0
"""How long ranks may take to meet, and an all-reduce."""
SKEW_SECONDS = 1.0
"""Between clocks: more makes logs of several nodes hard to read and file times wrong."""
LARGE_SKEW_SECONDS = 60.0
"""Short-lived credentials of object stores begin to be refused (S3 allows 15 minutes, others less)."""
SLOW_BYTES_PER_SECOND = 100e6
"""About what gigabit Ethernet carries."""
_ROUND_TRIPS = 20


def check_cluster(address: str | None, folder: str = ".", ranks_per_node: int | None = None) -> list[Finding]:
    """Look at the cluster at ``address`` (None: Ray's own rule, RAY_ADDRESS or the one that runs here).

    ``folder`` is looked at on each node for room. All-reduces are timed with one rank a node, and with
    ``ranks_per_node`` (by default as many as the node has GPUs, or two).
    """
    from pipeline.ray_session import ray_session

    try:
        with ray_session(address or "auto"):
            return _check(folder, ranks_per_node)
    except ConnectionError as error:
        advice = (
            "start it (`ray start --head` on one node, `ray start --address=…` on the others), or give --ray-address"
        )
        return [Finding("cluster", "problem", str(error), advice)]


def _check(folder: str, ranks_per_node: int | None) -> list[Finding]:
    import ray

    listed = ray.nodes()
    alive = [node for node in listed if node["Alive"]]
    names = _names(alive)
    gone = sorted({node["NodeManagerAddress"] for node in listed} - {node["NodeManagerAddress"] for node in alive})
    held = f"{len(alive)} nodes, CPUs {_total(alive, 'CPU'):g}, GPUs {_total(alive, 'GPU'):g}"
    findings = [Finding("cluster", "ok", held)]
    if gone:
        advice = "look at `ray start` and the network there, if they should be part of the cluster"
        findings = [Finding("cluster", "notice", f"{held}; lost: {', '.join(gone)}", advice)]
    probes = {names[node["NodeID"]]: _start(node) for node in alive}
    told, silent = _answers({name: probe.look.remote(folder) for name, probe in probes.items()}, ANSWER_SECONDS)
    for name, why in silent.items():
        advice = "see Ray's logs there (/tmp/ray/session_latest/logs); `make setup` on every node, in the same folder"
        findings.append(Finding(name, "problem", f"no process there answers: {why}", advice))
    findings += [_machine(name, facts) for name, facts in told.items()]
    findings.append(compare_versions({name: facts["versions"] for name, facts in told.items()}))
    findings += [_clock(name, probes[name]) for name in told]
    workers = [node for node in alive if names[node["NodeID"]] in told and _has_slots(node)]
    for probe in probes.values():
        ray.kill(probe)
    counts = [ranks_per_node or int(node["Resources"].get("GPU", 0)) or 2 for node in workers]
    several = [node for node, count in zip(workers, counts, strict=True) for _ in range(count)]
    findings.append(_all_reduce("all-reduce between nodes", workers))
    findings.append(_all_reduce("all-reduce between ranks", several))
    return findings


def _clock(name: str, probe: Any) -> Finding:
    import ray

    def ask() -> float:
        return ray.get(probe.clock.remote(), timeout=ANSWER_SECONDS)

    try:
        return judge_clock(name, *measure_clock(ask))
    except ray.exceptions.RayError as error:
        return Finding(f"clock {name}", "problem", f"no answer: {type(error).__name__}", "look at the network there")


def measure_clock(remote: Callable[[], float], local: Callable[[], float] = time.time) -> tuple[float, float]:
    """Seconds by which ``remote`` is ahead of ``local``, and how far off that can be.

    Of several round trips the shortest counts: the remote clock was read somewhere in it, so its middle is off by half
    of it at most (Cristian, Probabilistic clock synchronization, Distributed Computing 3, 1989).
    """
    best = (0.0, float("inf"))
    for _ in range(_ROUND_TRIPS):
        asked = local()
        answer = remote()
        half = (local() - asked) / 2
        if half < best[1]:
            best = (answer - asked - half, half)
    return best


def judge_clock(name: str, ahead: float, uncertainty: float) -> Finding:
    """Whether a clock that is ``ahead`` of this machine's, plus or minus ``uncertainty``, will do."""
    detail = f"{ahead:+.3f} s against this machine, ± {uncertainty:.3f} s"
    surely = abs(ahead) - uncertainty
    if surely <= SKEW_SECONDS:
        return Finding(f"clock {name}", "ok", detail)
    advice = "let every node keep its time by NTP: `timedatectl set-ntp true`, or chrony"
    return Finding(f"clock {name}", "problem" if surely > LARGE_SKEW_SECONDS else "notice", detail, advice)


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether all nodes have the same versions of what can change a result, by node."""
    differing = []
    for package in sorted({package for each in versions.values() for package in each}):
        nodes: dict[str, list[str]] = {}
        for name, each in versions.items():
            nodes.setdefault(each.get(package, "missing"), []).append(name)
        if len(nodes) > 1:
            differing.append(f"{package} " + ", ".join(f"{version} on {' '.join(on)}" for version, on in nodes.items()))
    if differing:
        return Finding("versions", "problem", f"differ between nodes: {'; '.join(differing)}", REINSTALL)
    return Finding("versions", "ok", f"the same on {len(versions)} nodes")


def bus_bandwidth(ranks: int, size: int, seconds: float) -> float:
    """Bytes a second that each rank's link carries in an all-reduce of ``size`` bytes: a ring sends each byte
    2(n-1)/n times, which makes the figure comparable between numbers of ranks and with the link's speed.

    As nccl-tests defines it: https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    return 2 * (ranks - 1) / ranks * size / seconds


def judge_all_reduce(name: str, ranks: int, times: Mapping[int, float]) -> Finding:
    """What all-reduces of several sizes (bytes → seconds) say of the network."""
    bandwidths = {size: bus_bandwidth(ranks, size, seconds) for size, seconds in times.items()}
    best = max(bandwidths.values())
    sizes = ", ".join(f"{_size(size)}: {seconds * 1e3:.1f} ms" for size, seconds in times.items())
    detail = f"{ranks} ranks, {best / 1e6:.0f} MB/s ({best * 8 / 1e9:.2f} Gbit/s) bus bandwidth; {sizes}"
    if best >= SLOW_BYTES_PER_SECOND:
        return Finding(name, "ok", detail)
    wait = 2 * (ranks - 1) / ranks * 400e6 / best
    advice = (
        f"gradients of 100 M parameters would take {wait:.0f} s a step: name a faster interface in GLOO_SOCKET_IFNAME "
        "(NCCL_SOCKET_IFNAME with GPUs), or raise batch.micro_batches so that steps are longer"
    )
    return Finding(name, "notice", detail, advice)


def _all_reduce(name: str, nodes: Sequence[Mapping[str, Any]]) -> Finding:
    import ray

    ranks = len(nodes)
    if ranks < 2:
        return Finding(name, "ok", "there is one rank only: nothing to exchange")
    probes = [_start(node, gpu=node["Resources"].get("GPU", 0) > 0) for node in nodes]
    try:
        first, silent = _answers({"0": probes[0].meeting_place.remote()}, ANSWER_SECONDS)
        if silent:
            return Finding(
                name, "problem", f"no rank could be started: {silent['0']}", "free CPUs or GPUs of the cluster"
            )
        calls = {
            f"rank {rank} on {node['NodeManagerAddress']}": probe.time_all_reduce.remote(
                rank, ranks, first["0"], MEETING_SECONDS
            )
            for rank, (probe, node) in enumerate(zip(probes, nodes, strict=True))
        }
        times, silent = _answers(calls, ANSWER_SECONDS + 2 * MEETING_SECONDS)
    finally:
        for probe in probes:
            ray.kill(probe)
    if silent:
        detail = "; ".join(f"{rank}: {why}" for rank, why in silent.items())
        advice = (
            "the nodes must reach one another on all ports: look at firewalls, and name the interface that joins them "
            "in GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME with GPUs)"
        )
        return Finding(name, "problem", f"the {ranks} ranks did not meet: {detail}", advice)
    return judge_all_reduce(name, ranks, next(iter(times.values())))


def _start(node: Mapping[str, Any], *, gpu: bool = False) -> Any:
    """A probe on ``node``, in a process of its own. It takes no CPU: a busy cluster can be looked at too."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from launch.cluster_probe import Probe

    here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    options = {"num_cpus": 0, "num_gpus": 1 if gpu else 0, "scheduling_strategy": here}
    return ray.remote(Probe).options(**options).remote()


def _answers(calls: Mapping[str, Any], seconds: float) -> tuple[dict[str, Any], dict[str, str]]:
    """What came within ``seconds``, by name, and for the others why not."""
    import ray

    ready, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=seconds)
    told, silent = {}, {}
    for name, call in calls.items():
        if call not in ready:
            silent[name] = f"no answer in {seconds:.0f} s"
            continue
        try:
            told[name] = ray.get(call)
        except Exception as error:
            silent[name] = (str(getattr(error, "cause", None) or error).strip().splitlines() or [type(error).__name__])[
                0
            ]
    return told, silent


def _machine(name: str, facts: Mapping[str, Any]) -> Finding:
    """One line a node; what is wrong there decides its state."""
    findings = [Finding(**each) for each in facts["findings"]]
    order = ("ok", "notice", "problem")
    worst = max((finding.state for finding in findings), key=order.index)
    advice = "; ".join(f"{finding.name}: {finding.advice}" for finding in findings if finding.advice)
    detail = "; ".join(f"{finding.name} {finding.detail}" for finding in findings)
    return Finding(f"{name} ({facts['host']})", worst, detail, advice)


def _has_slots(node: Mapping[str, Any]) -> bool:
    return node["Resources"].get("CPU", 0) > 0 or node["Resources"].get("GPU", 0) > 0


def _names(nodes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Ray's number of a node → what to call it: its address, with part of the number where several nodes share one."""
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return {
        node["NodeID"]: address if addresses.count(address) == 1 else f"{address} {node['NodeID'][:6]}"
        for node, address in zip(nodes, addresses, strict=True)
    }


def _total(nodes: Sequence[Mapping[str, Any]], resource: str) -> float:
    return sum(node["Resources"].get(resource, 0) for node in nodes)


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
