"""README and docs say what the code does: tables, links, commands and examples."""

from __future__ import annotations

import ast
import dataclasses
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import orjson
import pytest

from agents.artefacts import load_thresholds
from agents.cli import personas
from agents.event_decoder import load_decoder
from agents.importing import detect_format
from agents.kafka_admin import TOMBSTONE_MS
from agents.localstack.ports import Ports
from agents.page.server import create_page
from agents.page.source import MemoryPageSource, Overview
from agents.persona_writer import MAXIMUM_PERSONA_BYTES
from agents.settings import ENVIRONMENT_PREFIX, Settings
from agents.telemetry import CATALOGUE
from streams import (
    choosing,
    columns,
    counting,
    decoding,
    interests,
    positions,
    records,
    requesting,
    selection,
    state,
    topics,
    watch,
    wording,
)
from streams import personas as composing
from streams.dead_letters import MAXIMUM_KEY, MAXIMUM_PAYLOAD
from streams.decoding import Decoded, RejectReason, decode_event
from streams.mapping import parse_mapping
from streams.records import Action, ControlKind, Rule, WatchEvent
from streams.topics import DAY_MS, TOPICS

ROOT = Path(__file__).parents[2]
CONTRACTS = ROOT / "docs" / "contracts.md"
OPERATIONS = ROOT / "docs" / "operations.md"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/README.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CELL_BREAK = re.compile(r"(?<!\\)\|")
VARIABLE = re.compile(r"PERSONAS_[A-Z_]*[A-Z]")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in FENCE.finditer(text)]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def command_lines(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block as words: comments and variables in front taken away, pipelines cut."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        if not line.isascii():  # part of a picture
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|;&>")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:  # not a command line: a picture or a sentence
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|;&>"):
                yield command
                command = []
            elif command or not re.match(r"[A-Z_]+=", word):
                command.append(word)


def personas_commands() -> list[tuple[str, list[str]]]:
    found = []
    for block in BLOCKS:
        if block.language in ("", "sh", "bash"):
            found += [
                (str(block), words)
                for words in command_lines(block)
                if words and words[0] in ("personas", ".venv/bin/personas")
            ]
    return found


def table(page: Path, first_heading: str, after: str = "") -> list[list[str]]:
    """Rows of the first table after the text `after` whose first column has this heading, without markdown marks."""
    text = page.read_text()
    assert after in text, f"{page.name} has no {after!r}"
    lines = text[text.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_heading} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in CELL_BREAK.split(line)[1:-1]])
    return rows


def unquoted(cell: str) -> str:
    return cell.strip("`")


# Links, commands, examples


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page if not path else (page.parent / path).resolve()
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_there_are_commands_to_check() -> None:
    named = {words[1] for _, words in personas_commands()}
    assert {"worker", "init", "import", "produce", "replay", "clusters", "dlq", "up", "erase"} <= named


@pytest.mark.parametrize(("where", "words"), personas_commands(), ids=lambda value: str(value)[:60])
def test_commands_and_their_options_exist(where: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command: click.Command = personas
    context = click.Context(personas, info_name="personas")
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        found = command.get_command(context, rest[0])
        assert found is not None, f"{where}: there is no `{' '.join(words)}`"
        command, rest = found, rest[1:]
    assert not isinstance(command, click.Group) or rest, f"{where}: `{' '.join(words)}` names no command"
    for word in rest:
        if word.startswith("-") and word != "-":
            name = word.partition("=")[0]
            options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}
            assert name in options, f"{where}: `{' '.join(words)}` has an option {name} that does not exist"
    if not {"--help", "--version"} & set(rest):
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):  # an example's files need not be there
                monkeypatch.setattr(parameter.type, "exists", False)
        command.make_context(command.name or "", [*rest], parent=context)


def test_columns_are_mapped_only_in_files_that_are_read_by_columns() -> None:
    mapped = [(where, words) for where, words in personas_commands() if words[1] == "import" and "--map" in words]
    assert mapped
    assert [where for where, words in mapped if detect_format(Path(words[2])) == "movielens"] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_examples_compile(block: Block) -> None:
    compile(block.text, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "json"], ids=str)
def test_json_examples_parse(block: Block) -> None:
    orjson.loads(block.text)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [page.read_text() for page in PAGES]
    named = {name for text in pages for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)}
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_variables_that_are_named_exist(page: Path) -> None:
    known = {ENVIRONMENT_PREFIX + field.name.upper() for field in dataclasses.fields(Settings)}
    named = {name for name in VARIABLE.findall(page.read_text()) if not any(k.startswith(f"{name}_") for k in known)}
    assert named <= known


# docs/operations.md


def test_the_table_of_settings_is_complete_and_has_the_defaults() -> None:
    rows = {unquoted(row[0]): unquoted(row[1]) for row in table(OPERATIONS, "variable")}
    defaults = {
        ENVIRONMENT_PREFIX + field.name.upper(): "" if field.default == Path() else str(field.default)
        for field in dataclasses.fields(Settings)
    }
    assert rows == defaults


def test_secrets_are_called_secret_in_the_table_of_settings() -> None:
    secret = {unquoted(row[0]) for row in table(OPERATIONS, "variable") if "(secret)" in row[2]}
    fields = [field for field in dataclasses.fields(Settings) if field.metadata.get("secret")]
    assert secret == {ENVIRONMENT_PREFIX + field.name.upper() for field in fields}


def test_the_table_of_metrics_is_the_catalogue() -> None:
    rows = [[unquoted(cell) for cell in row] for row in table(OPERATIONS, "metric")]
    assert [(row[0], row[1], row[2], row[3].replace("`", ""), row[4]) for row in rows] == [
        (metric.name, str(metric.kind), metric.unit, ", ".join(metric.attributes), metric.description)
        for metric in CATALOGUE
    ]


def test_the_page_s_paths_are_those_it_serves() -> None:
    app = create_page(MemoryPageSource(Overview(at=0)))
    served = {resource.canonical.replace("{user_id}", "USER") for resource in app.router.resources()}
    named = {unquoted(row[0]).partition("?")[0] for row in table(OPERATIONS, "path")}
    assert served - {"/page.css", "/page.js"} == named


def test_the_ports_of_the_local_stack_are_the_defaults() -> None:
    text = " ".join(row[1] for row in table(OPERATIONS, "part"))
    assert sorted(map(int, re.findall(r"\d+", text))) == sorted(dataclasses.asdict(Ports()).values())


# docs/contracts.md: topics


def retention(topic: topics.Topic) -> str:
    if topic.compacted:
        return "compacted"
    return "for ever" if topic.retention_ms < 0 else f"{topic.retention_ms // DAY_MS} days"


def test_the_table_of_topics_is_that_of_the_code() -> None:
    rows = {unquoted(row[0]): row for row in table(CONTRACTS, "topic")}
    assert {name: row[3] for name, row in rows.items()} == {topic.name: retention(topic) for topic in TOPICS}
    assert {name: row[2] for name, row in rows.items()} == {
        topic.name: "per user" if topic.per_user else "1" for topic in TOPICS
    }
    keyed = {topic.name for topic in TOPICS if topic.per_user} - {topics.WATCH_POSITIONS}
    assert {name for name, row in rows.items() if row[1] == "`user_id`"} == keyed


def test_every_dead_letter_topic_belongs_to_a_topic() -> None:
    names = {topic.name for topic in TOPICS}
    letters = {name for name in names if name.endswith(topics.dead_letters_of(""))}
    assert {name.removesuffix(topics.dead_letters_of("")) for name in letters} <= names


# docs/contracts.md: records

RECORDS: dict[str, type] = {
    "## WatchEvent": records.WatchEvent,
    "## UserControl": records.UserControl,
    "## RefreshRequest": records.RefreshRequest,
    "## Persona\n": records.Persona,
    "**PersonaInterest**": records.PersonaInterest,
    "**PersonaNovel**": records.PersonaNovel,
    "**Evidence**": records.Evidence,
    "**Basis**": records.Basis,
    "**Model**": records.Model,
    "**Changes**": records.Changes,
    "**Explanation**": records.Explanation,
    "## DeadLetter": records.DeadLetter,
    "## UnknownVideo": records.UnknownVideo,
    "## ErasureReceipt": composing.ErasureReceipt,
    "## Position": positions.Position,
}


@pytest.mark.parametrize(("heading", "kind"), RECORDS.items(), ids=lambda value: str(value))
def test_the_tables_of_records_have_their_fields(heading: str, kind: type) -> None:
    rows = [unquoted(row[0]) for row in table(CONTRACTS, "field", after=heading)]
    assert rows == [field.name for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    ("heading", "field", "choices"),
    [
        ("## WatchEvent", "action", Action),
        ("## WatchEvent", "traffic", records.Traffic),
        ("## WatchEvent", "audience", records.Audience),
        ("## RefreshRequest", "rule", Rule),
        ("## RefreshRequest", "command", records.Command),
        ("## Persona\n", "tier", records.Tier),
        ("## Persona\n", "maturity", records.Maturity),
        ("**PersonaInterest**", "horizon", records.Horizon),
        ("## Position", "kind", positions.PositionKind),
    ],
)
def test_the_values_of_a_field_are_all_named(heading: str, field: str, choices: type) -> None:
    (row,) = [row for row in table(CONTRACTS, "field", after=heading) if unquoted(row[0]) == field]
    assert re.findall(r"`([a-z_]+)`", row[1]) == [str(choice) for choice in choices]  # type: ignore[attr-defined]


def test_defaults_of_watch_events_are_those_of_the_record() -> None:
    rows = {unquoted(row[0]): unquoted(row[2]) for row in table(CONTRACTS, "field", after="## WatchEvent")}
    defaults = {field.name: field.default for field in dataclasses.fields(WatchEvent)}
    assert {name for name, text in rows.items() if text == "dead letter"} == {
        name for name, default in defaults.items() if default is dataclasses.MISSING
    }
    assert (rows["action"], rows["traffic"], rows["autoplay"]) == ("play", "organic", "false")
    assert (defaults["action"], defaults["traffic"], defaults["autoplay"]) == ("play", "organic", False)


def test_every_control_is_described() -> None:
    named = [name for row in table(CONTRACTS, "kind") for name in re.findall(r"`([a-z_]+)`", row[0])]
    assert sorted(named) == sorted(ControlKind)


def test_ranks_of_versions() -> None:
    rows = {row[1]: int(row[0]) for row in table(CONTRACTS, "rank")}
    expected = {str(tier): rank for tier, rank in records.TIER_RANK.items()}
    assert rows == expected | {"removal": records.REMOVAL_RANK}
    assert records.persona_version(3, records.Tier.STUDENT) == 3 * 8 + rows["student"]


# docs/contracts.md: bad input and rules


def test_every_reason_of_a_dead_letter_is_in_the_table_of_inputs() -> None:
    results = [unquoted(row[1]) for row in table(CONTRACTS, "input")]
    assert {result for result in results if re.fullmatch(r"[a-z_]+_[a-z_]+", result)} == set(RejectReason)


def test_every_outcome_is_in_its_table() -> None:
    assert [unquoted(row[0]) for row in table(CONTRACTS, "outcome")] == list(watch.Outcome)


def test_weights_are_those_of_the_code() -> None:
    rows = {unquoted(row[0]): row[1] for row in table(CONTRACTS, "event")}
    assert set(rows) == set(Action)
    for action in Action:
        if action is not Action.PLAY:
            assert interests.watch_weight(WatchEvent("u", "v", 1, action=action)) == float(rows[action]), action


def test_every_rule_is_in_its_table() -> None:
    assert sorted(unquoted(row[0]) for row in table(CONTRACTS, "rule")) == sorted(Rule)


def facts() -> dict[str, str]:
    """Sentences of the page, with the constants of the code in them."""
    minute, day = 60_000, DAY_MS
    thresholds = load_thresholds(Path())
    settings = Settings()
    short, long = counting.SHORT_EVENTS, counting.LONG_EVENTS
    return {
        "future": f"more than {decoding.FUTURE_TOLERANCE_MS // minute} minutes after the append time",
        "late": f"Up to {counting.LATE_AFTER_MS // minute} minutes behind it",
        "too late": f"More than {counting.TOO_LATE_MS // day} days behind it is a dead letter",
        "record": f"value above {columns.MAXIMUM_RECORD_BYTES:,} bytes",
        "persona": f"a persona above {MAXIMUM_PERSONA_BYTES:,} bytes",
        "watch_ms": f"clamped to {decoding.MAXIMUM_WATCH_MS // 3_600_000} hours",
        "duration": f"or above {decoding.MAXIMUM_DURATION_MS // day} days",
        "fraction": f"clamped to {decoding.MAXIMUM_WATCH_FRACTION:,.0f}",
        "title": f"up to {decoding.MAXIMUM_TITLE:,} characters",
        "tags": f"list of up to {decoding.MAXIMUM_TAGS} texts of up to {decoding.MAXIMUM_TAG} characters",
        "user id": f"| `user_id` | text, 1 to {decoding.MAXIMUM_USER_ID_BYTES} bytes |",
        "ids": f"| `video_id` | text, 1 to {decoding.MAXIMUM_ID_BYTES} bytes |",
        "ring": f"among the viewer's last {state.RING} events",
        "gap": f"a gap of more than {counting.SESSION_GAP_MS // minute} minutes",
        "cap": f"gains a weight of at most {counting.SESSION_CAP:.0f} per session",
        "minimum": f"0 below {interests.MINIMUM_FRACTION}",
        "qualifying": f"has a weight of {counting.QUALIFYING_WEIGHT} or more and a cluster",
        "half-lives": f"by half every {short:.0f} (short horizon) or {long:.0f} (long horizon) units",
        "days": f"every {counting.SHORT_DAYS:.0f} or {counting.LONG_DAYS:.0f} days",
        "slots": f"A viewer has {state.SLOTS} clusters at a time",
        "lists": f"the hidden list ({state.HIDDEN}; the oldest entry gives way)",
        "pins": f"the pinned list ({state.PINNED})",
        "entry": f"count of {choosing.ENTER_COUNT:.2f} and a share of {choosing.ENTER_SHARE:.0%}",
        "interests": f"up to {choosing.MAXIMUM_INTERESTS}, largest share first",
        "novel": f"up to {choosing.MAXIMUM_NOVEL} topics",
        "disliked": f"negative weight of {choosing.DISLIKED} or more",
        "mature": f"fewer qualifying watches than the gate ({settings.first_persona_after}), "
        f"fewer than {selection.MATURE_AFTER}, more",
        "moved": f"whose share grew by {requesting.MOVED} or more",
        "confidence": f"count / (count + {selection.CONFIDENCE_HALF:.0f})",
        "item": f"{wording.ITEM_WORDS[0]} to {wording.ITEM_WORDS[1]} words, up to {wording.ITEM_CHARACTERS} characters",
        "summary": f"up to {wording.SUMMARY_CHARACTERS} characters",
        "template": f"`PERSONAS_TEMPLATE_AFTER` ({settings.template_after})",
        "first": f"`PERSONAS_FIRST_PERSONA_AFTER` ({settings.first_persona_after})",
        "age": f"`PERSONAS_MAXIMUM_AGE_DAYS` ({settings.maximum_age_days})",
        "drift": f"the accumulated regret passes {thresholds.regret}",
        "stride": f"checked every {thresholds.stride} qualifying watches",
        "memory": f"keeps {thresholds.memory:.0%} of it from check to check",
        "follow-up": f"within {requesting.SETTLING} qualifying watches of a `drift` or its `follow_up`",
        "cool-down": f"within {thresholds.cool_down} qualifying watches of the last request",
        "tombstones": f"keep tombstones for {TOMBSTONE_MS // day} days",
        "payload": f"the first {MAXIMUM_PAYLOAD:,} bytes of the value",
        "key": f"the first {MAXIMUM_KEY:,} bytes of the key",
        "groups": f"`{topics.WATCH_APP}` and `{topics.PERSONA_APP}`, with the prefix",
        "bootstrap": f"`{topics.BOOTSTRAP_HEADER[0]}: {topics.BOOTSTRAP_HEADER[1].decode()}`",
        "marker": f"`{topics.BOOTSTRAP_END_HEADER[0]}: {topics.BOOTSTRAP_END_HEADER[1].decode()}`",
        "partitions": f"`PERSONAS_PARTITIONS` partitions ({settings.partitions} by",
    }


@pytest.mark.parametrize(("name", "sentence"), facts().items())
def test_the_page_names_the_constants_of_the_code(name: str, sentence: str) -> None:
    assert sentence in " ".join(CONTRACTS.read_text().split()), name


def test_an_interest_stays_down_to_two_thirds_of_what_it_entered_with() -> None:
    assert pytest.approx(2 / 3) == choosing.STAY_FACTOR
    assert "two thirds of either" in CONTRACTS.read_text()


# Examples that are run


def test_the_field_mapping_reads_the_example() -> None:
    mapping, theirs, ours = [orjson.loads(b.text) for b in blocks(CONTRACTS) if b.language == "json"]
    read = parse_mapping(orjson.dumps(mapping))
    assert read.apply(theirs) == ours
    decoded = decode_event(orjson.dumps(theirs), b"ann", append_time=ours["ts"], mapping=read)
    assert isinstance(decoded, Decoded)
    assert decoded.record == WatchEvent(**{**ours, "action": Action.PLAY, "tags": tuple(ours["tags"])})


def test_the_decoder_reads_framed_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = [b.text for b in blocks(CONTRACTS) if b.language == "python"]
    (tmp_path / "my_events.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_events", raising=False)
    decoder = load_decoder("my_events:decode")
    value = orjson.dumps({"user_id": "ann", "video_id": "v", "ts": 1_767_225_600_000})
    framed = decode_event(b"\0\0\0\0\7" + value, b"ann", append_time=1_767_225_600_000, decoder=decoder)
    assert framed == Decoded(WatchEvent("ann", "v", 1_767_225_600_000))
    bare = decode_event(value, b"ann", append_time=1_767_225_600_000, decoder=decoder)
    assert isinstance(bare, decoding.Rejected)
    assert bare.reason is RejectReason.DECODER_FAILED
