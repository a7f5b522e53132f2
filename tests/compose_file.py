"""Reads compose.yaml and the Dockerfiles as `docker compose` does, as far as this project uses them."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

ROOT: Final = Path(__file__).parent.parent
COMPOSE_FILE: Final = ROOT / "compose.yaml"

_VARIABLE = re.compile(
    r"\$(?:(?P<escaped>\$)|(?P<bare>\w+)|\{(?P<name>\w+)(?:(?P<kind>:?[-?])(?P<word>[^}]*))?\})", re.ASCII
)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def interpolate(text: str, environment: Mapping[str, str]) -> str:
    """`$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME-default}`, `${NAME:?message}` and `$$` as compose has them."""

    def value(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        name, kind = match["bare"] or match["name"], match["kind"] or ""
        given = environment.get(name)
        if given is not None and (given or not kind.startswith(":")):
            return given
        if kind.endswith("?"):
            raise LookupError(f"{name}: {match['word']}")
        return match["word"] or ""

    return _VARIABLE.sub(value, text)


def load_compose(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """compose.yaml with anchors and merges resolved and variables replaced from `environment` (default: none set)."""
    document = YAML(typ="safe").load(COMPOSE_FILE)
    loaded = _interpolated(document, {} if environment is None else environment)
    assert isinstance(loaded, dict)
    return loaded


def default_environment() -> dict[str, str]:
    """The variables of the .env file beside compose.yaml."""
    lines = (ROOT / ".env").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def started(compose: Mapping[str, Any], profiles: str) -> dict[str, Any]:
    """The services that `up` starts with these comma-separated profiles."""
    active = set(profiles.split(","))
    return {
        name: service
        for name, service in compose["services"].items()
        if not service.get("profiles") or active & set(service["profiles"])
    }


def seconds(duration: str) -> float:
    """A compose duration such as `1m30s`."""
    parts = re.findall(r"(\d+)(ms|s|m|h)", duration)
    assert "".join(number + unit for number, unit in parts) == duration, duration
    return sum(int(number) * _UNITS[unit] for number, unit in parts)


def environment_of(service: Mapping[str, Any], shell: Mapping[str, str]) -> dict[str, str]:
    """A service's own variables: those without a value are taken from the shell, and are absent if it has none."""
    own: Mapping[str, str | None] = service.get("environment", {})
    values = {name: shell.get(name) if value is None else value for name, value in own.items()}
    return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Dockerfile:
    """One Dockerfile. instructions: (stage, keyword, rest), continued lines joined, stages counted from 0."""

    path: Path
    instructions: tuple[tuple[int, str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
        joined = "\n".join(lines).replace("\\\n", " ").splitlines()
        stage, found = -1, []
        for line in joined:
            keyword, rest = line.split(maxsplit=1)
            stage += keyword == "FROM"
            found.append((stage, keyword, " ".join(rest.split())))
        return cls(path, tuple(found))

    @property
    def last_stage(self) -> int:
        return self.instructions[-1][0]

    def all(self, keyword: str, stage: int | None = None) -> list[str]:
        """What follows each `keyword`, in every stage or one."""
        return [rest for s, word, rest in self.instructions if word == keyword and stage in (None, s)]

    def final(self, keyword: str) -> list[str]:
        """What follows each `keyword` of the stage that becomes the image."""
        return self.all(keyword, self.last_stage)

    @property
    def environment(self) -> dict[str, str]:
        """ENV of the image."""
        pairs = [pair for line in self.final("ENV") for pair in shlex.split(line)]
        return dict(pair.split("=", 1) for pair in pairs)

    def copied(self) -> list[str]:
        """Paths that COPY takes from the build context."""
        lines = [line.split() for line in self.all("COPY") if not line.startswith("--from")]
        return [source for line in lines for source in line[:-1]]


@dataclass(frozen=True)
class Container:
    """What a container of one of our images runs: image and service put together, before any substitution."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    health: tuple[str, ...]
    health_limit: float
    grace: float


def container_of(service: Mapping[str, Any], shell: Mapping[str, str]) -> Container:
    """The container of a service that this project builds; `command` replaces CMD, the entry point stays."""
    dockerfile = Dockerfile.read(ROOT / service["build"].get("dockerfile", "Dockerfile"))
    command = service.get("command") or json.loads(dockerfile.final("CMD")[-1])
    health = service.get("healthcheck", {})
    kind, *test = health.get("test", ["CMD"])
    assert kind == "CMD", "a health check of ours needs no shell"
    return Container(
        command=(*json.loads(dockerfile.final("ENTRYPOINT")[-1]), *command),
        environment=dockerfile.environment | environment_of(service, shell),
        folder=dockerfile.final("WORKDIR")[-1],
        health=tuple(test),
        health_limit=seconds(health.get("start_period", "0s")),
        grace=seconds(service.get("stop_grace_period", "10s")),
    )


def _interpolated(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return interpolate(value, environment)
    if isinstance(value, Mapping):
        return {key: _interpolated(item, environment) for key, item in value.items()}
    if isinstance(value, list):
        return [_interpolated(item, environment) for item in value]
    return value
