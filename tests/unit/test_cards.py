"""Persona cards in the terminal, and the commands that print them."""

from __future__ import annotations

import io
import unicodedata
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType
from rich.text import Text

from agents import cards
from agents.cli import get as get_module
from agents.cli import personas
from agents.explanations import scale_end
from agents.settings import Settings
from agents.stores.cassandra import CassandraStore
from agents.stores.memory import MemoryStore
from agents.stores.ports import StoredPersona
from streams.decoding import decode_persona
from streams.records import Explanation, Persona, Rule, encode
from tests.persona_samples import NOON, TITLES, hostile_persona, sample_persona

HOSTILE = "[bold red]x[/bold red] \x1b[2J\x1b]0;owned\x07 \u202egnp.exe {0} %s\nforged line [link=http://x]y[/link]"


def shown(item: RenderableType, width: int = 100, **options: bool) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(item)  # type: ignore[arg-type]  # flags only
    return stream.getvalue()


def card_text(persona: Persona) -> str:
    return shown(cards.persona_card(persona, TITLES.get, {9: "true crime"}.get))


def test_a_card_shows_everything_a_persona_says() -> None:
    text = card_text(sample_persona())
    for part in (
        "ann  mature, student, version 42, 2026-11-22 12:00:02",
        "Cooks Italian at weekends",
        "italian cooking",
        "41%",
        "↓ falling",
        "2026-11-20  Hand-rolled tagliatelle in one hour  v-pasta",
        "(no title)  v-unknown",
        "28%",
        "↑ rising",
        "short term, pinned",
        "bikepacking trips  through gravel cycling",
        "Longer rides follow from testing bikes.",
        "true crime",
        "214 watches, 2026-09-23 to 2026-11-22, effective sample 63.5",
        "student smollm2-135m, 412 tokens in, 96 out, 1.8 s",
        "42 after 34",
        "drift",
    ):
        assert part in text


def test_a_cold_persona_has_a_card_too() -> None:
    cold = sample_persona(interests=(), novel=(), avoid=(), explanation=None, previous_version=None, cached=True)
    text = card_text(cold)
    assert "none yet" in text
    assert "Might like next" not in text
    assert "42 after none" in text
    assert "all from the cache" in text


def test_bars_are_as_long_as_the_shares() -> None:
    text = card_text(sample_persona())
    lengths = [line.count("█") for line in text.splitlines() if "%" in line]
    assert lengths == [8, 5]  # 41% and 28% of 20


@given(st.floats(allow_nan=False), st.integers(1, 60))
def test_a_bar_has_its_width_and_never_overflows(share: float, width: int) -> None:
    drawn = cards.bar(share, width)
    assert len(drawn) == width
    if share >= 1:
        assert drawn == "█" * width
    if share <= 0:
        assert not drawn.strip()


@given(st.text())
def test_visible_text_cannot_drive_a_terminal(text: str) -> None:
    result = cards.visible(text)
    assert len(result) == len(text)
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in result)
    assert cards.visible(result) == result


@pytest.mark.parametrize("color", [False, True])
def test_hostile_text_is_text(color: bool) -> None:
    persona = hostile_persona("ann", HOSTILE)
    explanation = persona.explanation
    assert explanation is not None
    titles = {HOSTILE: HOSTILE}
    text = "".join(
        shown(item, width=400, force_terminal=color)
        for item in (
            cards.persona_card(persona, titles.get, {9: HOSTILE}.get),
            cards.history_table([persona, replace(persona, user_id=HOSTILE)]),
            cards.why_card(HOSTILE, 42, explanation),
            cards.why_table([persona]),
            cards.persona_line(replace(persona, user_id=HOSTILE)),
            cards.removal_line(HOSTILE, NOON, HOSTILE),
        )
    )
    plain = Text.from_ansi(text).plain  # rich's own colours removed
    assert "[bold red]x[/bold red] �[2J�]0;owned� �gnp.exe {0} %s�forged line [link=http://x]y[/link]" in plain
    assert "\x1b[2J" not in text
    assert "\x1b]" not in text
    assert "\u202e" not in text
    assert not any(line.startswith("forged") for line in plain.splitlines())


def test_times_beyond_the_calendar_are_shown_as_numbers() -> None:
    assert cards.day(NOON) == "2026-11-22"
    assert cards.moment(2**62) == str(2**62)


def why(**changes: object) -> Explanation:
    explanation = sample_persona().explanation
    assert explanation is not None
    return replace(explanation, **changes)  # type: ignore[arg-type]  # tests name any field


def test_why_shows_value_threshold_and_what_moved() -> None:
    text = shown(cards.why_card("ann", 42, why(value=0.071, threshold=0.06)))
    for part in (
        "ann  version 42, rule drift, 37 watches since the last request",
        "The interests have moved further than chance explains.",
        "Accumulated regret 0.071 of 0.060",
        "↑ threshold 0.060",
        "Squared divergence from the last request, added up watch by watch (bits² x watches).",
        "Divergence 0.212 bits, beyond what chance explains (0.142)",
        "↑ chance 0.142",
    ):
        assert part in text
    risen, fallen = text[text.index("Risen") :].split("Fallen")
    assert [line.split()[0] for line in risen.splitlines()[1:4]] == ["gravel", "before", "now"]
    bars = {line.split()[0]: line.count("█") for line in fallen.splitlines() if "%" in line}
    assert bars["before"] > bars["now"] > 0
    assert [line.split()[-1] for line in (risen + fallen).splitlines() if "%" in line] == ["3%", "28%", "62%", "41%"]


def test_the_marks_stand_where_the_scale_says() -> None:
    drawn = cards.scale(0.8, 0.4, 1.0, 20)
    assert drawn == "█" * 8 + "┃" + "█" * 7 + " " * 4
    assert cards.scale(0.2, 0.8, 1.0, 10) == "██      ┃ "
    assert cards.scale(0.5, None, 1.0, 10) == "█████     "
    text = shown(cards.why_card("ann", 42, why()), width=50).splitlines()
    bars = [i for i, line in enumerate(text) if "┃" in line]
    assert len(bars) == 2
    for i in bars:
        assert text[i + 1].index("↑") == text[i].index("┃")


@given(st.floats(0, 1e9), st.none() | st.floats(0, 1e9), st.integers(1, 80))
def test_a_scale_has_its_width_and_one_mark(value: float, mark: float | None, width: int) -> None:
    drawn = cards.scale(value, mark, scale_end(value, mark), width)
    assert len(drawn) == width
    assert drawn.count("┃") == (mark is not None)


@pytest.mark.parametrize(
    ("rule", "value", "threshold", "said"),
    [
        (Rule.COLD_START, 20.0, 20.0, ("Enough was watched for a first persona.", "20 of 20 qualifying watches")),
        (Rule.FOLLOW_UP, 0.0712, 0.06, ("The interests moved lately", "Accumulated regret 0.071 of 0.060")),
        (Rule.MATURITY, 0.0712, 0.06, ("known more precisely", "Accumulated regret 0.071 of 0.060")),
        (Rule.AGE, 31.25, 30.0, ("maximum age", "Age 31.2 of 30 days")),
    ],
)
def test_each_rule_says_what_it_measures(rule: Rule, value: float, threshold: float, said: tuple[str, str]) -> None:
    text = shown(cards.why_card("ann", 42, Explanation(rule, value, threshold, 20)))
    for part in said:
        assert part in text
    assert "chance" not in text


def test_a_control_measures_nothing() -> None:
    text = shown(cards.why_card("ann", 42, Explanation(Rule.CONTROL, 1.0, 1.0, 3)))
    assert "The viewer asked for a change." in text
    assert "┃" not in text


def test_a_small_divergence_is_called_chance() -> None:
    text = shown(cards.why_card("ann", 42, why(divergence=0.1, risen=(), fallen=())))
    assert "Divergence 0.100 bits, within what chance explains (0.142)" in text
    assert "Risen" not in text


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_why_fits_any_terminal_and_needs_no_colour(width: int) -> None:
    long = why(risen=((7, "a label that is longer than most terminals are wide, said twice over", 0.0, 1.0),))
    items = (cards.why_card("ann", 42, long), cards.why_table([sample_persona(), sample_persona(explanation=None)]))
    for item in items:
        plain = shown(item, width=width)
        assert max(map(len, plain.splitlines())) <= width
        assert Text.from_ansi(shown(item, width=width, force_terminal=True)).plain.split() == plain.split()
    assert "100%" in shown(items[0], width=width)


def test_every_refresh_has_a_line_on_one_scale() -> None:
    personas = [
        sample_persona(),
        sample_persona(sequence=4, explanation=why(divergence=0.05, divergence_null=0.2)),
        sample_persona(sequence=3, rule=Rule.COLD_START, explanation=Explanation(Rule.COLD_START, 20.0, 20.0, 20)),
        sample_persona(sequence=2, explanation=None),
    ]
    lines = [line for line in shown(cards.why_table(personas)).splitlines() if "2026" in line]
    assert [line.split()[0] for line in lines] == ["42", "34", "26", "18"]
    filled = [line.count("█") for line in lines]
    assert filled[0] > filled[1] > 0
    assert filled[2:] == [0, 0]
    assert lines[0].index("┃") < lines[1].index("┃")
    assert "20 of 20 qualifying watches" in lines[2]
    assert "not stored" in lines[3]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()

    async def connect(settings: Settings, *, deadline_seconds: float = 10.0) -> MemoryStore:
        for persona in (sample_persona(sequence=4, summary="Cooks."), sample_persona()):
            row = StoredPersona(persona.user_id, persona.version, 0, persona.request_id, persona.tier, encode(persona))
            await store.put(row)
        return store

    monkeypatch.setattr(CassandraStore, "connect", connect)
    monkeypatch.setattr(get_module, "_names", lambda _: (TITLES.get, {9: "true crime"}.get))


@pytest.mark.usefixtures("stored")
def test_get_prints_a_card() -> None:
    result = CliRunner().invoke(personas, ["get", "ann"])
    assert result.exit_code == 0
    assert "Cooks Italian" in result.stdout
    assert "Versions" not in result.stdout


@pytest.mark.usefixtures("stored")
def test_get_prints_the_history() -> None:
    result = CliRunner().invoke(personas, ["get", "ann", "--history"])
    assert "Versions" in result.stdout
    assert "Cooks." in result.stdout


@pytest.mark.usefixtures("stored")
def test_get_json_is_the_published_bytes() -> None:
    result = CliRunner().invoke(personas, ["get", "ann", "nobody", "--json", "--history"])
    assert result.exit_code == 0
    first, second = result.stdout.splitlines()
    assert decode_persona(first.encode()) == sample_persona()
    assert decode_persona(second.encode()).summary == "Cooks."
    assert "'nobody'" in result.stderr


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("command", ["get", "why"])
def test_nobody_found_is_exit_status_1(command: str) -> None:
    result = CliRunner().invoke(personas, [command, "no\x1b[2Jbody"])
    assert result.exit_code == 1
    assert not result.stdout
    assert result.stderr == "no persona is stored for 'no\\x1b[2Jbody'\n"


@pytest.mark.usefixtures("stored")
def test_why_as_json() -> None:
    result = CliRunner().invoke(personas, ["why", "ann", "--json"])
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    answer = orjson.loads(line)
    assert answer["rule"] == "drift"
    assert answer["explanation"]["threshold"] == 1.9


@pytest.mark.usefixtures("stored")
def test_why_as_a_card() -> None:
    result = CliRunner().invoke(personas, ["why", "ann"])
    assert "Accumulated regret 2.314 of 1.900" in result.stdout
    assert "Refreshes" not in result.stdout


@pytest.mark.usefixtures("stored")
def test_why_with_the_history() -> None:
    result = CliRunner().invoke(personas, ["why", "ann", "--history"])
    card, table = result.stdout.split("Refreshes")
    assert "Accumulated regret 2.314 of 1.900" in card
    assert [line.split()[0] for line in table.splitlines()[2:] if line.strip()] == ["42", "34"]


@pytest.mark.usefixtures("stored")
def test_why_with_the_history_as_json_lines() -> None:
    lines = CliRunner().invoke(personas, ["why", "ann", "--history", "--json"]).stdout.splitlines()
    assert [orjson.loads(line)["version"] for line in lines] == [42, 34]


def test_no_user_is_a_usage_error() -> None:
    assert CliRunner().invoke(personas, ["get"]).exit_code == 2


@pytest.mark.parametrize(
    ("command", "address", "variable"),
    [
        (["tail"], "127.0.0.1:9", "PERSONAS_KAFKA_BOOTSTRAP"),
        (["get", "ann"], "127.0.0.1 port 9", "PERSONAS_CASSANDRA_HOSTS"),
        (["why", "ann"], "127.0.0.1 port 9", "PERSONAS_CASSANDRA_HOSTS"),
    ],
)
def test_nothing_there_is_one_line_with_address_and_remedy(command: list[str], address: str, variable: str) -> None:
    environment = {"PERSONAS_KAFKA_BOOTSTRAP": "127.0.0.1:9", "PERSONAS_CASSANDRA_PORT": "9"}
    result = CliRunner().invoke(personas, command, env=environment)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert address in result.stderr
    assert "`personas up`" in result.stderr
    assert variable in result.stderr


def test_without_a_registry_cards_have_ids_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    title_of, label_of = get_module._names(Settings(registry=tmp_path / "absent"))
    assert title_of("v-pasta") is None
    assert label_of(9) is None
    assert "titles are not shown" in capsys.readouterr().err
