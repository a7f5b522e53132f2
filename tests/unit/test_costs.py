"""What wording costs: the arithmetic, what persona records state, and the command."""

from __future__ import annotations

import gzip
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from agents.cli import personas
from agents.cli.cost import committed_figures
from benchmarks.scale_model import read_inputs
from streams.costs import MONTH_DAYS, CostInputs, as_dict, costs, measure
from streams.personas import NO_INTERESTS, compose
from streams.records import Model, Persona, Tier, encode
from streams.tasks import Wording
from tests.request_samples import NOON, sample_request

ROOT = Path(__file__).parents[2]
ROUND = CostInputs(
    viewers=1000,
    personas_per_day=0.5,
    texts_per_persona=8,
    cache_hit_rate=0.5,
    teacher_share=0.1,
    template_share=0.2,
    student_tokens_in=270,
    student_tokens_out=30,
    student_tokens_per_second=100,
    student_busy=0.5,
    student_hour_price=2,
    teacher_tokens_in=400,
    teacher_tokens_out=50,
    teacher_price_in=1,
    teacher_price_out=4,
)


def persona(tier: Tier, **model: int) -> Persona:
    request = sample_request()
    texts = Wording(NO_INTERESTS, ("One.", "Two."), ("Three.", "Four."))
    block = replace(Model("m", "1", "h", 0, 0, 0), **model)  # type: ignore[arg-type]
    return compose(request, texts, None, tier=tier, model=block, cached=False, generated_at=NOON)


SAMPLE = [
    persona(Tier.STUDENT, items=5, items_cached=2, tokens_in=900, tokens_out=90),
    persona(Tier.STUDENT, items=5, items_cached=5),
    persona(
        Tier.TEACHER,
        items=5,
        items_cached=1,
        items_teacher=1,
        tokens_in=2000,
        tokens_out=150,
        teacher_tokens_in=500,
        teacher_tokens_out=30,
    ),
    persona(Tier.TEMPLATE, items=5, tokens_in=300, tokens_out=60),
]


# The arithmetic


def test_each_step_by_hand() -> None:
    found = costs(ROUND)
    cache, student, teacher, template = found.tiers
    assert found.personas_day == 500
    assert [part.tier for part in found.tiers] == ["cache", "student", "teacher", "template"]
    assert [part.texts for part in found.tiers] == pytest.approx([2000, 1400, 200, 400])
    assert [part.share for part in found.tiers] == pytest.approx([0.5, 0.35, 0.05, 0.1])
    assert (student.tokens_in, student.tokens_out) == pytest.approx((378_000, 42_000))
    assert (teacher.tokens_in, teacher.tokens_out) == pytest.approx((80_000, 10_000))
    hours = 420_000 / (100 * 0.5 * 3600)
    assert student.cost_day == pytest.approx(2 * hours)
    assert teacher.cost_day == pytest.approx(0.08 * 1 + 0.01 * 4)
    assert (cache.cost_day, template.cost_day) == (0, 0)
    assert found.machines == pytest.approx(hours / 24)
    assert found.cost_day == pytest.approx(2 * hours + 0.12)
    assert found.cost_month == pytest.approx(30 * found.cost_day)
    assert found.cost_per_thousand_personas == pytest.approx(2 * found.cost_day)
    assert found.cost_month_per_million_viewers == pytest.approx(1000 * found.cost_month)


@pytest.mark.parametrize("name", [known.name for known in fields(CostInputs)])
def test_every_input_changes_something(name: str) -> None:
    assert costs(replace(ROUND, **{name: getattr(ROUND, name) * 0.7})) != costs(ROUND)


def test_without_viewers_or_worded_texts_nothing_costs_anything() -> None:
    for changes in ({"viewers": 0.0}, {"cache_hit_rate": 1.0}, {"texts_per_persona": 0.0}, {"personas_per_day": 0.0}):
        found = costs(replace(ROUND, **changes))
        assert (found.cost_day, found.machines) == (0, 0)


@given(
    st.builds(
        lambda hit, teacher, template: replace(
            ROUND, cache_hit_rate=hit, teacher_share=teacher * (1 - template), template_share=template
        ),
        *[st.floats(0, 1)] * 3,
    )
)
def test_the_tiers_make_up_the_whole(inputs: CostInputs) -> None:
    found = costs(inputs)
    assert sum(part.texts for part in found.tiers) == pytest.approx(4000)
    assert all(part.texts >= 0 and part.cost_day >= 0 for part in found.tiers)
    assert found.cost_day == pytest.approx(sum(part.cost_day for part in found.tiers))
    assert sum(part.cost_month for part in found.tiers) == pytest.approx(found.cost_day * MONTH_DAYS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"viewers": -1.0}, "viewers is -1"),
        ({"viewers": float("nan")}, "viewers is nan"),
        ({"viewers": float("inf")}, "viewers is inf"),
        ({"cache_hit_rate": 1.01}, "more than 1"),
        ({"teacher_share": 0.6, "template_share": 0.6}, "1.2 together"),
        ({"student_busy": 0.0}, "student_busy is 0"),
        ({"student_tokens_per_second": 0.0}, "student_tokens_per_second is 0"),
    ],
)
def test_inputs_that_cannot_be_are_named(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        replace(ROUND, **changes)


# Persona records


def test_shares_and_tokens_of_personas() -> None:
    found = measure(SAMPLE).inputs()
    assert found == pytest.approx(
        {
            "texts_per_persona": 5,
            "cache_hit_rate": 8 / 20,
            "teacher_share": 1 / 12,
            "template_share": 5 / 12,
            # Three texts of the first persona and three of the third; the template's tries are paid for too.
            "student_tokens_in": (900 + 1500 + 300) / 6,
            "student_tokens_out": (90 + 120 + 60) / 6,
            "teacher_tokens_in": 500,
            "teacher_tokens_out": 30,
        }
    )


def test_what_no_persona_tells_is_not_measured() -> None:
    assert measure(SAMPLE[1:2]).inputs() == {"texts_per_persona": 5, "cache_hit_rate": 1}
    assert measure(SAMPLE[3:]).inputs().keys() == {
        "texts_per_persona",
        "cache_hit_rate",
        "teacher_share",
        "template_share",
    }
    with pytest.raises(ValueError, match="nothing to measure"):
        measure([]).inputs()


def test_the_costs_of_what_was_measured_are_those_of_its_tokens() -> None:
    """As many personas as were measured cost what their tokens cost."""
    sums = measure(SAMPLE)
    inputs = replace(ROUND, viewers=len(SAMPLE), personas_per_day=1, **sums.inputs())
    found = {part.tier: part for part in costs(inputs).tiers}
    assert found["student"].tokens_in == pytest.approx(sums.student_tokens_in)
    assert found["teacher"].tokens_out == pytest.approx(sums.teacher_tokens_out)


# The committed inputs


def test_the_committed_inputs_are_the_scale_models() -> None:
    scale = {known.name: known.value for known in read_inputs()}
    figures = {name: figure.value for name, figure in committed_figures().items()}
    assert figures["personas_per_day"] == pytest.approx(scale["refreshes"] * scale["events_per_day"] / 1000)
    assert figures["student_tokens_per_second"] == pytest.approx(scale["student_personas"] * scale["tokens"], rel=1e-3)
    assert figures["student_busy"] == scale["busy"]
    assert f"| cache_hit_rate | {figures['cache_hit_rate']} |" in (ROOT / "benchmarks" / "real_events.md").read_text()


def test_the_committed_inputs_are_all_there_each_with_its_kind() -> None:
    figures = committed_figures()
    assert list(figures) == [known.name for known in fields(CostInputs)]
    CostInputs(**{name: figure.value for name, figure in figures.items()})
    assert {figure.source.split(":")[0] for figure in figures.values()} <= {
        "given",
        "measured",
        "provisional",
        "assumed",
    }


# The command


def run(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(personas, ["cost", *arguments], **options)


def test_the_command_shows_each_tier_and_each_input() -> None:
    result = run(env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    for text in ("cache", "student", "teacher", "template", "cost a month of a million viewers", "assumed", "measured"):
        assert text in result.output


def test_flags_set_inputs_and_json_has_them_with_their_source() -> None:
    flags = [part for name, value in asdict(ROUND).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = run(*flags, "--json")
    assert result.exit_code == 0, result.output
    document = orjson.loads(result.stdout)
    assert document["costs"] == as_dict(costs(ROUND))
    assert document["inputs"]["viewers"] == {"value": 1000, "source": "flag"}


@pytest.mark.parametrize("name", ["personas.jsonl", "personas.jsonl.gz"])
def test_personas_of_a_file_are_measured_and_a_flag_wins(tmp_path: Path, name: str) -> None:
    lines = [
        *(encode(p) for p in SAMPLE),
        b'{"user_id":"x","tombstone":"erased"}',
        b'{"user_id":"y","removed":"z"}',
        b"",
    ]
    content = b"\n".join(lines)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    result = run("--from", str(tmp_path / name), "--teacher-share", "0.25", "--json")
    assert result.exit_code == 0, result.output
    inputs = orjson.loads(result.stdout)["inputs"]
    assert inputs["cache_hit_rate"]["value"] == 0.4
    assert inputs["cache_hit_rate"]["source"].startswith("measured: 4 personas of ")
    assert inputs["teacher_share"] == {"value": 0.25, "source": "flag"}
    assert inputs["viewers"]["source"].startswith("given")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "nothing to measure"),
        (b"not json\n", "line 1 is no persona"),
        (encode(SAMPLE[0]) + b'\n{"user_id":"ann"}\n', "line 2 is no persona"),
    ],
)
def test_a_file_that_holds_no_personas_is_one_line_and_exit_status_1(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "personas.jsonl"
    path.write_bytes(content)
    result = run("--from", str(path))
    assert result.exit_code == 1
    assert said in result.stderr
    assert str(path) in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    result = run("--from", str(tmp_path / "none.jsonl"))
    assert result.exit_code == 1
    assert "none.jsonl" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--teacher-share", "1.5"], "teacher-share"),
        (["--viewers", "-1"], "viewers"),
        (["--viewers", "many"], "viewers"),
        (["--teacher-share", "0.9"], "together"),
        (["--student-busy", "0"], "student_busy is 0"),
        (["--viewers", "nan"], "viewers"),
    ],
)
def test_values_that_cannot_be_are_refused(flags: list[str], said: str) -> None:
    result = run(*flags)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_template_with_texts_of_models_has_them_counted_as_theirs() -> None:
    mixed = persona(
        Tier.TEMPLATE, items=5, items_cached=1, items_teacher=1, items_plain=1, tokens_in=600, tokens_out=60
    )
    assert measure([mixed]).texts == {"cache": 1, "student": 2, "teacher": 1, "template": 1}
    assert measure([mixed]).inputs()["student_tokens_in"] == 300
    older = persona(Tier.TEMPLATE, items=5, items_cached=1)
    assert measure([older]).texts == {"cache": 1, "student": 0, "teacher": 0, "template": 4}


def test_personas_of_before_the_teacher_can_be_measured(tmp_path: Path) -> None:
    old = orjson.loads(encode(SAMPLE[0]))
    for name in ("items_teacher", "teacher_tokens_in", "teacher_tokens_out", "items_plain"):
        del old["model"][name]
    path = tmp_path / "old.jsonl"
    path.write_bytes(orjson.dumps(old))
    result = run("--from", str(path), "--json")
    assert result.exit_code == 0, result.output
    assert orjson.loads(result.stdout)["inputs"]["student_tokens_in"]["value"] == 300
