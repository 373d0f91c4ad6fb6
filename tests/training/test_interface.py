"""The interface that collectives use; several of them are in tests/end_to_end/test_several_hosts.py."""

import os
import socket

import pytest

from pipeline.training.interface import VARIABLES, interface_towards, use_interface_towards


@pytest.fixture(autouse=True)
def as_in_a_fresh_process(monkeypatch):
    for name in (*VARIABLES, "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "for the end of the test")  # or what is set there would stay
        monkeypatch.delenv(name)


def test_loopback_leads_to_this_machine():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("localhost") == "lo"


def test_a_name_that_nobody_knows_leads_nowhere(monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror("unknown")  # a real look-up may take a name server's timeout

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert interface_towards("no-such-host") is None


def test_ranks_of_one_machine_use_its_loopback(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    use_interface_towards("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0", "the user's choice"


def test_ranks_of_several_machines_never_use_the_loopback(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    use_interface_towards("127.0.1.1")  # what Debian makes of a machine's own name
    assert "GLOO_SOCKET_IFNAME" not in os.environ
