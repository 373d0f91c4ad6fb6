"""The network interface that a rank's connections to the others leave by.

In: an address that all ranks use, or this machine's own in their network. Out: GLOO_SOCKET_IFNAME and
NCCL_SOCKET_IFNAME, unless the user has set them. Left alone, gloo takes the address that the machine's own name has,
which Debian puts on the loopback; NCCL takes the first interface it likes, which may be a container bridge.
"""

from __future__ import annotations

import os
import socket

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def use_interface_towards(address: str) -> None:
    """Let the collectives of this process use the interface by which it reaches ``address``; before they connect.

    Changes nothing when the address is not known here, or is only this machine's loopback while the ranks are on
    several: then the libraries' own choice is as good.
    """
    name = interface_towards(address)
    world = os.environ.get("WORLD_SIZE", "1")
    alone = os.environ.get("LOCAL_WORLD_SIZE", world) == world
    if name is not None and (name != "lo" or alone):
        for variable in VARIABLES:
            os.environ.setdefault(variable, name)


def interface_towards(address: str) -> str | None:
    """Name of the interface by which this machine reaches ``address``, a host name or an IP; None if it can't be told.
    For an address of its own, the interface that has it."""
    import psutil

    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # of UDP: asks the routing table and sends nothing
            here = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == here for each in addresses):
            return name
    return None
