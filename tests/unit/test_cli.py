"""The `personas` command from outside: help, exit statuses, one clear line for what does not answer, and `replay`."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import orjson
import pytest
from click.testing import CliRunner

from agents.cli import COMMANDS, personas
from agents.clusters.files import PACKAGED, packaged_registry
from agents.settings import ENVIRONMENT_PREFIX
from streams.decoding import RejectReason
from streams.records import Rule
from streams.watch import Outcome

START = 1_767_225_600_000
MINUTE = 60_000
PERSONAS = (sys.executable, "-m", "agents")
SECONDS = 25
"""Limit for a command to give up, on a busy machine; each takes 1 to 5 on a quiet one."""


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, stdin: bytes = b"", timeout: float = 120
) -> subprocess.CompletedProcess[bytes]:
    """Run the command as its own process, with no setting but those given."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return subprocess.run(
        [*PERSONAS, *arguments],
        input=stdin,
        capture_output=True,
        timeout=timeout,
        check=False,
        env={**clean, **(environment or {})},
    )


# Help


def all_commands() -> list[tuple[str, ...]]:
    """Every command and subcommand as its words."""
    context = click.Context(personas)
    found: list[tuple[str, ...]] = []
    for name in COMMANDS:
        command = personas.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, inner) for inner in command.list_commands(context)]
    return found


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(personas, [*words, "--help"])
    assert result.exit_code == 0, result.output
    usage, _, rest = result.output.partition("\n\n")
    assert usage.startswith(f"Usage: personas {' '.join(words)} ")
    sentence = " ".join(rest.split("\n\n")[0].split())
    assert re.search(r"[A-Z].{15,}\.( |$)", sentence), f"no sentence: {sentence!r}"


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_option_is_described(words: tuple[str, ...]) -> None:
    command: click.Command = personas
    for word in words:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None
        command = found
    options = [p for p in command.params if isinstance(p, click.Option)]
    undescribed = [o.opts for o in options if not o.help and not isinstance(o.type, click.Choice)]
    assert undescribed == []


WITHOUT_EXAMPLES = frozenset({"clusters", "demo"})
"""A group whose commands have them, and a command that is run as it is."""


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_shows_an_example(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(personas, [*words, "--help"])
    examples = re.findall(rf"^ +.*personas {' '.join(words)}\b", result.output, re.MULTILINE)
    assert examples or " ".join(words) in WITHOUT_EXAMPLES, result.output


def test_the_list_of_commands_is_quick_and_complete() -> None:
    """It imports no command: the help must not wait for client libraries."""
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom agents.cli import personas\n"
        "print(CliRunner().invoke(personas, ['--help']).output)\n"
        "print([m for m in ('faust', 'aiokafka', 'cassandra', 'tritonclient', 'onnxruntime') if m in sys.modules])"
    )
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert listed.stdout.rstrip().endswith("[]")
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text[:30])}", listed.stdout, re.MULTILINE)


# Exit statuses


@pytest.mark.parametrize(
    "arguments", [["config"], ["get", "ann"], ["worker"], ["replay", "-", "--out", "x"], ["status"]]
)
def test_an_unknown_variable_is_one_line_and_exit_status_2(arguments: list[str]) -> None:
    done = run(*arguments, environment={"PERSONAS_KAFKA_BOOTSTRAPP": "x"})
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert "PERSONAS_KAFKA_BOOTSTRAPP" in done.stderr.decode()
    assert done.stdout == b""


@pytest.mark.parametrize(
    "arguments", [["gett", "ann"], ["get"], ["get", "ann", "--no-such-option"], ["produce", "x", "y"]]
)
def test_wrong_usage_is_exit_status_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(personas, arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """Settings whose every address refuses connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "PERSONAS_KAFKA_BOOTSTRAP": f"127.0.0.1:{port}",
        "PERSONAS_CASSANDRA_PORT": str(port),
        "PERSONAS_TRITON_URL": f"127.0.0.1:{port}",
        "PERSONAS_DATA_FOLDER": str(tmp_path),
    }


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["get", "ann"], "Cassandra"),
        (["why", "ann"], "Cassandra"),
        (["export", "ann"], "Cassandra"),
        (["tail"], "Kafka"),
        (["control", "ann", "opt_out"], "Kafka"),
        (["erase", "ann", "--yes"], "Cassandra"),
        (["produce", "-"], "Kafka"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_does_not_answer_is_one_line(arguments: list[str], what: str, nowhere: dict[str, str]) -> None:
    began = time.monotonic()
    done = run(*arguments, environment=nowhere)
    error = done.stderr.decode()
    assert done.returncode == 1
    assert error.count("\n") == 1, error
    assert f"{what} at 127.0.0.1" in error
    assert "PERSONAS_" in error
    assert done.stdout == b""
    assert time.monotonic() - began < SECONDS


def test_init_waits_as_long_as_it_is_told_and_says_so(nowhere: dict[str, str]) -> None:
    done = run("init", "--wait", "1", environment=nowhere)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert [line for line in lines if not line.startswith("waiting: ")] == lines[-1:]
    assert "error: Kafka at 127.0.0.1" in lines[-1]
    assert "Traceback" not in done.stderr.decode()


def test_doctor_names_everything_that_does_not_answer(nowhere: dict[str, str]) -> None:
    done = run("doctor", "--json", environment=nowhere)
    assert done.returncode == 1
    checks = {check["name"]: check for check in orjson.loads(done.stdout)["checks"]}
    assert {name for name, check in checks.items() if check["status"] == "fail"} == {"Kafka", "Cassandra", "Triton"}
    assert all(check["remedy"] for check in checks.values() if check["status"] == "fail")
    assert b"Traceback" not in done.stderr


def test_a_worker_waits_for_kafka_and_stops_when_told(nowhere: dict[str, str]) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    worker = subprocess.Popen([*PERSONAS, "worker"], stderr=subprocess.PIPE, env={**clean, **nowhere})
    assert worker.stderr is not None
    try:
        line = worker.stderr.readline().decode()
        assert "waiting for Kafka at 127.0.0.1" in line
        worker.send_signal(signal.SIGTERM)
        _, rest = worker.communicate(timeout=60)
    finally:
        worker.kill()
        worker.wait()
    assert worker.returncode == 0
    assert b"Traceback" not in rest


# Replay

GOOD_VIEWERS, WATCHES = ("ann", "ben"), 30


def line(user: str, video: str, number: int, **fields: object) -> bytes:
    return orjson.dumps({"user_id": user, "video_id": video, "ts": START + number * 10 * MINUTE, **fields})


def events() -> list[bytes]:
    """Two viewers of 30 watches each, and every kind of hostile line among them."""
    registry = packaged_registry()
    wanted = {cluster: [] for cluster in sorted(registry.cards)[:3]}  # type: dict[int, list[str]]
    for row in (PACKAGED.parent / "demo_catalogue.jsonl").read_bytes().splitlines():
        video = orjson.loads(row)["video_id"]
        cluster = registry.cluster_of(video)
        if cluster in wanted and len(wanted[cluster]) < 5:
            wanted[cluster].append(video)
    videos = [video for group in zip(*wanted.values(), strict=True) for video in group]
    lines = [line(user, videos[number % len(videos)], number) for number in range(WATCHES) for user in GOOD_VIEWERS]
    return lines + hostile(videos[0])


def hostile(video: str) -> list[bytes]:
    """One line of each kind; the comment is its class."""
    return [
        b"not json",  # dead letters
        b"",
        b"[1, 2]",
        b'{"user_id": "ann"}',
        line("", video, 31),
        line("x" * 10_240, video, 31),
        line("ann\x00", video, 31),
        line("ann", video, 31, ts=START // 1_000),
        line("ann", video, 31, watch_ms=-5),
        line("ann", video, 31, action="binge"),
        line("ann", video, 31, schema_version=9),
        line("ann", video, 31, title=7),
        line("ann", video, 31, ts=START - 40 * 86_400_000),
        b'{"user_id": "\xff", "video_id": "v", "ts": 1767225600000}',
        line("ann", video, 31, title="x" * 1_100_000),  # a dead letter: larger than a record may be
        line("ann", video, 32, watch_ms=10**12),  # clamped
        line("ann", video, 33, ts=START + 40 * 365 * 86_400_000),  # clamped: far in the future
        line("ben", video, 20),  # late or a duplicate
        line("ben", video, 34, event_id="once"),  # applied, then a duplicate
        line("ben", video, 34, event_id="once"),
        line("ben", video, 35, traffic="bot"),  # not organic
        line("ben", "no such video", 36),  # applied, unassigned
        line("ben", "__proto__", 37, title="<script>alert(1)</script> '; DROP TABLE personas; -- {0} %s"),
    ]


@pytest.fixture(scope="module")
def event_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "events.jsonl"
    path.write_bytes(b"".join(each + b"\n" for each in events()))
    return path


def replayed(out: Path, source: str | Path, *options: str, stdin: bytes = b"") -> dict[str, Any]:
    """The summary of a replay with the packaged registry as it is."""
    done = run("replay", str(source), "--out", str(out), "--registry", str(PACKAGED), "--json", *options, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    summary: dict[str, Any] = orjson.loads(done.stdout)
    assert summary == orjson.loads((out / "summary.json").read_bytes())
    return summary


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def records_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [orjson.loads(each) for each in (folder / name).read_bytes().splitlines()]


@pytest.fixture(scope="module")
def plain(event_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A replay of the event file without options: its folder and summary."""
    out = tmp_path_factory.mktemp("plain")
    return out, replayed(out, event_file)


def test_every_line_is_in_exactly_one_class(plain: tuple[Path, dict[str, Any]]) -> None:
    out, summary = plain
    classes = [str(outcome) for outcome in Outcome if outcome is not Outcome.DEAD_LETTER]
    assert summary["lines"] == len(events())
    assert sum(summary[name] for name in classes) + summary["dead_letters"] == summary["lines"]
    assert sum(summary["dead_letters_by_reason"].values()) == summary["dead_letters"] == 15
    assert len(records_of(out, "dead_letters.jsonl")) == summary["dead_letters"]
    assert (summary["clamped"], summary["not_organic"], summary["unassigned"]) == (2, 1, 2)
    assert summary["duplicate"] + summary["late"] == 2


def test_each_hostile_line_has_its_reason(plain: tuple[Path, dict[str, Any]]) -> None:
    assert plain[1]["dead_letters_by_reason"] == {
        RejectReason.NOT_JSON: 3,
        RejectReason.NOT_AN_OBJECT: 1,
        RejectReason.MISSING_FIELD: 1,
        RejectReason.EMPTY_ID: 1,
        RejectReason.TOO_LONG: 1,
        RejectReason.UNPRINTABLE_ID: 1,
        RejectReason.TS_NOT_MILLISECONDS: 1,
        RejectReason.OUT_OF_RANGE: 1,
        RejectReason.UNKNOWN_VALUE: 1,
        RejectReason.UNKNOWN_SCHEMA_VERSION: 1,
        RejectReason.WRONG_TYPE: 1,
        RejectReason.TOO_LATE: 1,
        RejectReason.TOO_LARGE: 1,
    }


def test_personas_answer_the_requests(plain: tuple[Path, dict[str, Any]]) -> None:
    out, summary = plain
    requests, written = records_of(out, "requests.jsonl"), records_of(out, "personas.jsonl")
    assert summary["requests"] == len(requests) == sum(summary["requests_by_rule"].values())
    assert {request["rule"] for request in requests} <= set(Rule)
    assert {persona["request_id"] for persona in written} <= {request["request_id"] for request in requests}
    assert {persona["user_id"] for persona in written} == set(GOOD_VIEWERS)
    assert summary["personas"] == len(written)
    assert set(summary["personas_by_tier"]) == {"template"}
    for persona in written:
        assert persona["interests"] or persona["maturity"] == "cold"


def test_two_runs_write_the_same_bytes(plain: tuple[Path, dict[str, Any]], event_file: Path, tmp_path: Path) -> None:
    replayed(tmp_path, event_file)
    assert files_of(tmp_path) == files_of(plain[0])
    assert set(files_of(tmp_path)) == {"requests.jsonl", "personas.jsonl", "dead_letters.jsonl", "summary.json"}


def test_gzip_and_standard_input_give_the_same(
    plain: tuple[Path, dict[str, Any]], event_file: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "events.jsonl.gz"
    packed.write_bytes(gzip.compress(event_file.read_bytes()))
    replayed(tmp_path / "gz", packed)
    replayed(tmp_path / "stdin", "-", stdin=event_file.read_bytes())
    replayed(tmp_path / "crlf", "-", stdin=event_file.read_bytes().replace(b"\n", b"\r\n"))
    assert files_of(tmp_path / "gz") == files_of(tmp_path / "stdin") == files_of(plain[0])
    assert files_of(tmp_path / "crlf") == files_of(plain[0])


def test_bootstrap_asks_once_per_eligible_viewer_at_the_end(event_file: Path, tmp_path: Path) -> None:
    summary = replayed(tmp_path, event_file, "--bootstrap")
    requests = records_of(tmp_path, "requests.jsonl")
    assert sorted(request["user_id"] for request in requests) == sorted(GOOD_VIEWERS)
    assert summary["requests_by_rule"] == {"cold_start": len(GOOD_VIEWERS)}
    assert all(request["tier_limit"] is None for request in requests)


def test_controls_take_effect_where_their_time_is(event_file: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls.jsonl"
    erase = {"control_id": "1", "user_id": "ann", "kind": "erase", "ts": START + 25 * 10 * MINUTE}
    leave = {"control_id": "2", "user_id": "ben", "kind": "opt_out", "ts": START + 15 * 10 * MINUTE}
    controls.write_bytes(b"\n".join([orjson.dumps(erase), orjson.dumps(leave), b"{}", b"no control"]) + b"\n")
    summary = replayed(tmp_path / "out", event_file, "--controls", str(controls))
    written = records_of(tmp_path / "out", "personas.jsonl")
    removed = {record["user_id"]: record["tombstone"] for record in written if "tombstone" in record}
    assert removed == {"ann": "erased", "ben": "opted_out"}
    assert summary["tombstones"] == 2
    assert summary["opted_out"] > 0
    letters = records_of(tmp_path / "out", "dead_letters.jsonl")
    refused = [letter for letter in letters if letter["source_topic"] == "user-controls"]
    assert len(refused) == 2
    later = [record for record in written if record.get("epoch") == 1]
    # What came after the erasure is counted from nothing: enough for a template, far below the gate.
    assert all(record["user_id"] == "ann" and record["basis"]["events"] < 10 for record in later)
    assert all(record["maturity"] == "cold" and record["previous_version"] is None for record in later)


def test_a_bad_control_is_no_event(event_file: Path, tmp_path: Path) -> None:
    controls = tmp_path / "controls.jsonl"
    controls.write_bytes(b"no control\n")
    summary = replayed(tmp_path / "out", event_file, "--controls", str(controls))
    classes = [str(outcome) for outcome in Outcome if outcome is not Outcome.DEAD_LETTER]
    assert sum(summary[name] for name in classes) + summary["dead_letters"] == summary["lines"] == len(events())
    assert sum(summary["dead_letters_by_reason"].values()) == summary["dead_letters"]


def test_without_a_registry_the_file_s_own_videos_are_placed(tmp_path: Path) -> None:
    titles = ("How to shape a sourdough loaf", "Sourdough starter from rye flour", "Scoring bread before baking")
    lines = [line("ann", f"new-{n % 3}", n, title=titles[n % 3]) for n in range(24)]
    content = b"".join(each + b"\n" for each in lines)
    summaries = []
    for name in ("first", "second"):
        done = run("replay", "-", "--out", str(tmp_path / name), "--json", stdin=content)
        assert done.returncode == 0, done.stderr.decode()
        summaries.append(orjson.loads(done.stdout))
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")
    assert summaries[0]["registry_version"] == packaged_registry().version + 1
    assert (summaries[0]["applied"], summaries[0]["unassigned"], summaries[0]["unknown_videos"]) == (24, 0, 0)
    (newest,) = records_of(tmp_path / "first", "personas.jsonl")[-1:]
    assert {found["video_id"] for found in newest["interests"][0]["evidence"]} <= {"new-0", "new-1", "new-2"}


def test_an_empty_file_is_replayed(tmp_path: Path) -> None:
    summary = replayed(tmp_path / "out", "-")
    assert (summary["lines"], summary["requests"], summary["personas"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (None, "missing.jsonl"),
        (b"no gzip at all", "broken.jsonl.gz"),
        (gzip.compress(b"x" * 100_000)[:60], "short.jsonl.gz"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"\xff" * 40, "damaged.jsonl.gz"),
    ],
    ids=["missing", "no gzip", "cut short", "damaged"],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    done = run("replay", str(path), "--out", str(tmp_path / "out"), "--registry", str(PACKAGED))
    assert done.returncode in (1, 2)
    assert name in done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    assert not (tmp_path / "out").exists()


def test_a_missing_control_file_or_registry_is_wrong_usage(event_file: Path, tmp_path: Path) -> None:
    for option in ("--controls", "--registry"):
        done = run("replay", str(event_file), "--out", str(tmp_path / "out"), option, str(tmp_path / "none"))
        assert done.returncode == 2
        assert b"none" in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_damaged_registry_is_one_line(event_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "registry"
    shutil.copytree(PACKAGED, folder)
    (folder / "clusters.json").write_bytes(b"{}")
    done = run("replay", str(event_file), "--out", str(tmp_path / "out"), "--registry", str(folder))
    assert done.returncode == 2
    assert done.stderr.decode().count("\n") == 1
    assert "clusters.json" in done.stderr.decode()


def test_a_folder_that_cannot_be_written_is_one_line(event_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    done = run("replay", str(event_file), "--out", str(tmp_path / "file" / "out"), "--registry", str(PACKAGED))
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr.decode()
