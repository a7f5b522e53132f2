"""Ports: validity, agreement with the settings, and a clear word about a port in use."""

from __future__ import annotations

import os
import socket
from dataclasses import astuple, replace

import pytest

from agents.localstack.ports import PORTS_OF_PART, PortError, Ports, check_free, free_ports, ports_of
from agents.settings import Settings


def test_defaults_are_the_addresses_that_workers_use_by_default() -> None:
    assert ports_of(Settings()) == Ports()


def test_settings_and_ports_agree_both_ways() -> None:
    ports = free_ports()
    served = ports.settings(Settings())
    assert (served.kafka_bootstrap, served.cassandra_port) == (f"127.0.0.1:{ports.kafka}", ports.cassandra)
    again = ports_of(served)
    assert (again.kafka, again.cassandra, again.triton_grpc) == (ports.kafka, ports.cassandra, ports.triton_grpc)


def test_every_port_belongs_to_one_part() -> None:
    names = [name for part in PORTS_OF_PART for name in Ports().of_part(part)]
    assert sorted(names) == sorted(Ports.__dataclass_fields__)


def test_an_offset_moves_every_port() -> None:
    assert astuple(Ports().shifted(100)) == tuple(port + 100 for port in astuple(Ports()))


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_number_that_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(PortError, match=f"{port} is not a port"):
        replace(Ports(), kafka=port)


def test_one_port_for_two_servers_is_refused() -> None:
    with pytest.raises(PortError, match="29093 is given to two"):
        replace(Ports(), kafka=29093)


@pytest.mark.parametrize("bootstrap", ["broker.example:9092", "127.0.0.1:1,127.0.0.1:2", "127.0.0.1"])
def test_a_stack_elsewhere_is_refused(bootstrap: str) -> None:
    with pytest.raises(PortError, match="PERSONAS_KAFKA_BOOTSTRAP"):
        ports_of(Settings(kafka_bootstrap=bootstrap))


def test_a_port_in_use_names_the_port_and_its_holder() -> None:
    ports = free_ports()
    with socket.socket() as server:
        server.bind(("127.0.0.1", ports.storage))
        server.listen()
        check_free(ports, ["kafka", "triton"])
        with pytest.raises(PortError) as caught:
            check_free(ports, ["kafka", "cassandra"])
    message = str(caught.value)
    assert f"port {ports.storage} (storage) is in use by process {os.getpid()}" in message
    assert "--port-offset" in message
    assert str(ports.kafka) not in message
