"""llama.cpp's own server, built from a locked source distribution, for the benchmark of the student alone.

The source comes inside llama-cpp-python's source distribution, by pip, against a checksum. Its server is built once
with cmake and g++, in release mode and for the processor of this machine (AVX-512 and AMX where it has them).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import aiohttp

from agents.student_client import Answer, StudentFailed, StudentUnavailable
from streams.prompts import Prompt

PACKAGE: Final = "llama-cpp-python"
VERSION: Final = "0.3.36"
SHA256: Final = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
"""Of the source distribution, which holds llama.cpp in vendor/llama.cpp."""
BUILD_OPTIONS: Final = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    # GCC drops stores to AMX's tile configuration, and the server dies at its first prompt (llama.cpp #20824, #26954).
    "-DCMAKE_CXX_FLAGS=-fno-tree-dse -fno-dse",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # otherwise the build downloads a web page
)
SLOTS: Final = 32
"""Requests that the server works on at the same time."""
CONTEXT: Final = 512
"""Tokens a slot: prompt and answer fit."""
THREADS: Final = len(os.sched_getaffinity(0))
"""As many as OpenVINO takes: all that there are."""
SERVER_OPTIONS: Final = (
    *("--threads", str(THREADS), "--parallel", str(SLOTS), "--ctx-size", str(SLOTS * CONTEXT)),
    *("--cont-batching", "--flash-attn", "auto", "--cache-ram", "0", "--no-webui"),
)
"""Continuous batching, prompts kept in their slots (each request asks for it). Prompts of idle slots are not copied to
memory: none comes again, so that would only cost time."""
START_SECONDS: Final = 120.0
HOST: Final = "127.0.0.1"
_LOG_LINES: Final = 15

Tell = Callable[[str], None]


class LlamaCppError(RuntimeError):
    """llama.cpp could not be fetched, built or started; the message says why and what to do."""


class LlamaCppStudent:
    """The student behind llama.cpp's server, called as the one behind Triton is. Make it inside a running loop."""

    def __init__(self, url: str, deadline_seconds: float) -> None:
        """url: http://host:port; deadline_seconds: of each call."""
        self._url = url
        limits = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=limits, timeout=aiohttp.ClientTimeout(total=deadline_seconds))

    async def word(self, prompt: Prompt, *, seed: int = 0) -> Answer:
        """See `StudentClient.word`; only seed 0, which is greedy."""
        if seed:
            raise ValueError("only greedy answers are compared")
        began = time.monotonic()
        try:
            async with self._session.post(f"{self._url}/completion", json=request_body(prompt)) as response:
                if response.status != 200:
                    raise StudentFailed(f"llama.cpp answered {response.status}: {await response.text()}")
                body = await response.json()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise StudentUnavailable(f"llama.cpp at {self._url}: {error!r}") from error
        return answer_of(body, round((time.monotonic() - began) * 1000))

    async def ready(self) -> bool:
        """See `StudentClient.ready`."""
        try:
            async with self._session.get(f"{self._url}/health") as response:
                return response.status == 200
        except aiohttp.ClientError:
            return False

    async def close(self) -> None:
        """See `StudentClient.close`."""
        await self._session.close()


def request_body(prompt: Prompt) -> dict[str, Any]:
    """The same request in llama.cpp's words. It reads the very grammar that xgrammar reads."""
    return {
        "prompt": prompt.text,
        "n_predict": prompt.maximum_tokens,
        "grammar": prompt.grammar,
        "temperature": 0.0,
        "samplers": ["top_k"],
        "top_k": 1,
        "cache_prompt": True,
        "stream": False,
    }


def answer_of(body: Mapping[str, Any], latency_ms: int) -> Answer:
    """An answer of `/completion`. Raises StudentFailed if it is none."""
    try:
        return Answer(
            text=str(body["content"]),
            finish_reason="length" if body["stop_type"] == "limit" else "stop",
            tokens_in=int(body["tokens_evaluated"]),
            tokens_out=int(body["tokens_predicted"]),
            latency_ms=latency_ms,
            model_name="llama.cpp",
            model_version=VERSION,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StudentFailed(f"llama.cpp gave no usable answer: {error!r}") from error


def ensure_server(folder: Path, tell: Tell) -> Path:
    """The server's program in `folder`, fetched and built (10 to 20 minutes) if missing. Raises LlamaCppError."""
    build = folder / f"build-{VERSION}"
    program = build / "bin" / "llama-server"
    if program.is_file():
        return program
    for tool in ("cmake", "g++", "make"):
        if shutil.which(tool) is None:
            raise LlamaCppError(
                f"{tool} is missing: building llama.cpp takes cmake, make and g++ (Debian: apt install cmake make g++)"
            )
    folder.mkdir(parents=True, exist_ok=True)
    source = _source(folder, tell)
    tell("configuring llama.cpp")
    _run(["cmake", "-S", str(source), "-B", str(build), *BUILD_OPTIONS], folder)
    jobs = str(os.cpu_count() or 1)
    tell(f"building llama.cpp's server with {jobs} jobs: 10 to 20 minutes, once; log in {folder / 'build.log'}")
    _run(["cmake", "--build", str(build), "--target", "llama-server", "--parallel", jobs], folder)
    return program


@contextmanager
def started_server(program: Path, weights: Path, log: Path) -> Iterator[str]:
    """The URL of a server of these weights on a free port, ended at the end. Raises LlamaCppError."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [str(program), "--model", str(weights), "--host", HOST, "--port", str(port), *SERVER_OPTIONS]
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        url = f"http://{HOST}:{port}"
        _await_ready(server, url, log)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _source(folder: Path, tell: Tell) -> Path:
    """llama.cpp's source below `folder`, downloaded if missing."""
    source = folder / f"llama_cpp_python-{VERSION}" / "vendor" / "llama.cpp"
    if source.is_dir():
        return source
    tell(f"downloading the source of {PACKAGE} {VERSION}")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as work:
        archive = _downloaded(Path(work))
        unpacked = Path(work) / "unpacked"
        with tarfile.open(archive) as opened:
            opened.extractall(unpacked, filter="data")
        (root,) = unpacked.iterdir()
        root.rename(folder / f"llama_cpp_python-{VERSION}")
    if not source.is_dir():
        raise LlamaCppError(f"{PACKAGE} {VERSION} has no vendor/llama.cpp")
    return source


def _downloaded(work: Path) -> Path:
    wanted = work / "wanted.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", f"--no-binary={PACKAGE}", "--require-hashes", "-r", str(wanted), "-d", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(work.glob("*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        raise LlamaCppError(f"cannot download {PACKAGE} {VERSION}: pip said\n{done.stderr.strip()}")
    with archives[0].open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != SHA256:
        raise LlamaCppError(f"{archives[0].name} has the SHA-256 {found}, the locked one is {SHA256}: it was not used")
    return archives[0]


def _run(command: list[str], folder: Path) -> None:
    log = folder / "build.log"
    with log.open("ab") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        raise LlamaCppError(f"`{' '.join(command[:3])} ...` failed; the end of {log}:\n{_end_of(log)}")


def _await_ready(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until its model is loaded."""
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        if server.poll() is not None:
            raise LlamaCppError(f"llama-server ended while starting; the end of {log}:\n{_end_of(log)}")
        # While it loads there is nobody there, then it answers 503.
        with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - on this machine
            return
        time.sleep(0.1)
    raise LlamaCppError(f"llama-server is not ready after {START_SECONDS:.0f} s; the end of {log}:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines)
