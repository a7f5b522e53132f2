"""Rewrites `assets.json`: `python -m agents.localstack.lock_assets`, after a change of a version below; read the diff.

The locked list is what gets downloaded, so a user's machine resolves nothing. Each root is resolved on its own:
resolved together, jgo lets the dependency management of one root's parent POM replace another root's own versions.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import orjson
from jgo.maven import MavenContext

from agents.localstack.assets import LOCK_FILE, maven_repositories

ROOTS: Final = {
    "kafka": ("org.apache.kafka:kafka_2.13:4.4.0", "org.apache.logging.log4j:log4j-slf4j-impl:2.25.5"),
    "cassandra": ("org.apache.cassandra:cassandra-all:5.0.9",),
}
OTHER_PLATFORMS: Final = ("osx", "windows", "aarch_64", "riscv64")
"""Classifiers with one of these are native libraries for machines that the local stack does not support."""


def main() -> None:
    """Resolve the roots, download every jar, and write coordinates, checksums and licences, sorted."""
    lock: dict[str, Any] = orjson.loads(LOCK_FILE.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        context = MavenContext(repo_cache=Path(folder), remote_repos=maven_repositories(), timeout=60)
        for part, roots in ROOTS.items():
            lock[part] = _locked(context, roots)
            print(f"{part}: {len(lock[part])} jars", file=sys.stderr)  # noqa: T201
    LOCK_FILE.write_text(_one_entry_a_line(lock), encoding="utf-8")


def _locked(context: MavenContext, roots: tuple[str, ...]) -> list[dict[str, str]]:
    artifacts: dict[tuple[str, str, str], Any] = {}
    for root in roots:
        dependency = context.create_dependency(root)
        dependency.scope = "compile"
        inputs, transitive = context.resolver.resolve([dependency])
        for found in [*inputs, *(d for d in transitive if d.scope in ("compile", "runtime"))]:
            a = found.artifact
            if not any(word in a.classifier for word in OTHER_PLATFORMS):
                artifacts.setdefault((a.groupId, a.artifactId, a.classifier), a)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(_entry, (artifacts[key] for key in sorted(artifacts))))


def _entry(artifact: Any) -> dict[str, str]:  # noqa: ANN401
    classifier = f":{artifact.classifier}" if artifact.classifier else ""
    return {
        "jar": f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}{classifier}",
        "sha256": hashlib.sha256(artifact.resolve().read_bytes()).hexdigest(),
        "licence": _licence(artifact),
    }


def _licence(artifact: Any) -> str:  # noqa: ANN401
    """Licence names as the POM states them, or the nearest parent POM that does."""
    pom = artifact.component.pom()
    while pom is not None:
        names = [element.text.strip() for element in pom.elements("licenses/license/name") if element.text]
        if names:
            return " or ".join(names)
        pom = artifact.context.pom_parent(pom)
    raise SystemExit(f"{artifact}: no POM states a licence; look it up before locking it")


def _one_entry_a_line(lock: dict[str, list[dict[str, str]]]) -> str:
    sections = (
        f'"{name}": [\n' + ",\n".join("  " + orjson.dumps(entry).decode() for entry in entries) + "\n]"
        for name, entries in lock.items()
    )
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    main()
