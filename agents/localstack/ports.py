"""Ports of the local stack: the one place that knows them."""

from __future__ import annotations

import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final

import psutil

from agents.localstack import LocalStackError
from agents.settings import Settings

PORTS_OF_PART: Final[Mapping[str, tuple[str, ...]]] = {
    "kafka": ("kafka", "controller"),
    "cassandra": ("cassandra", "storage"),
    "triton": ("triton_grpc", "triton_http", "triton_metrics"),
}
"""The first port of each part is the one that clients are told."""
PARTS: Final = tuple(PORTS_OF_PART)


class PortError(LocalStackError):
    """A port is in use, or no valid port number; the message names it, its holder if known, and what to do."""


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports on 127.0.0.1, each 1 to 65535."""

    kafka: int = 29092
    controller: int = 29093
    cassandra: int = 29042
    storage: int = 17000
    triton_http: int = 8000
    triton_grpc: int = 8001
    triton_metrics: int = 8002

    def __post_init__(self) -> None:
        numbers = [getattr(self, f.name) for f in fields(self)]
        if outside := [n for n in numbers if not 0 < n < 65536]:
            raise PortError(f"{outside[0]} is not a port: choose numbers from 1 to 65535")
        if twice := sorted({n for n in numbers if numbers.count(n) > 1}):
            raise PortError(f"port {twice[0]} is given to two servers: choose different ones")

    def shifted(self, offset: int) -> Ports:
        """Every port plus `offset`. Raises PortError if one leaves the valid range."""
        return Ports(**{f.name: getattr(self, f.name) + offset for f in fields(self)})

    def of_part(self, part: str) -> dict[str, int]:
        """The ports of one part by name, the clients' first."""
        return {name: getattr(self, name) for name in PORTS_OF_PART[part]}

    def settings(self, base: Settings) -> Settings:
        """`base` with the addresses of a stack on these ports."""
        return replace(
            base,
            kafka_bootstrap=f"127.0.0.1:{self.kafka}",
            cassandra_hosts="127.0.0.1",
            cassandra_port=self.cassandra,
            triton_url=f"127.0.0.1:{self.triton_grpc}",
        )


def ports_of(settings: Settings) -> Ports:
    """The ports that `settings` expects Kafka, Cassandra and Triton at, with defaults for those no client is told.

    Raises PortError if an address is not one on this machine.
    """
    return Ports(
        kafka=_local_port("kafka_bootstrap", settings.kafka_bootstrap),
        cassandra=_local_port("cassandra_hosts", f"{settings.cassandra_hosts}:{settings.cassandra_port}"),
        triton_grpc=_local_port("triton_url", settings.triton_url),
    )


def free_ports() -> Ports:
    """Ports that are free now, picked by the kernel."""
    names = [f.name for f in fields(Ports)]
    sockets = [socket.socket() for _ in names]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return Ports(**dict(zip(names, (each.getsockname()[1] for each in sockets), strict=True)))
    finally:
        for each in sockets:
            each.close()


def check_free(ports: Ports, parts: Collection[str]) -> None:
    """Raise PortError for every port of `parts` that something listens on."""
    wanted = {name: port for part in parts for name, port in ports.of_part(part).items()}
    taken = {name: port for name, port in wanted.items() if not _is_free(port)}
    if not taken:
        return
    lines = [f"port {port} ({name}) is in use by {_holder(port)}" for name, port in taken.items()]
    advice = (
        "Stop it, or choose other ports: `personas up --port-offset 100`, or one flag per port (`personas up --help`)."
    )
    raise PortError("\n".join([*lines, advice]))


def _local_port(name: str, address: str) -> int:
    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        raise PortError(
            f"{name}={address} is not one address on this machine (127.0.0.1:PORT): "
            f"the local stack only serves this machine; unset PERSONAS_{name.upper()} to use it"
        )
    return int(port)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do, so that connections of a stopped server that linger in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _holder(port: int) -> str:
    for connection in psutil.net_connections(kind="tcp"):
        if connection.status != psutil.CONN_LISTEN or connection.laddr.port != port or connection.pid is None:
            continue
        try:
            process = psutil.Process(connection.pid)
            return f"process {process.pid}: {' '.join(process.cmdline())[:120] or process.name()}"
        except psutil.Error:
            break
    return "a process that this user may not see"
