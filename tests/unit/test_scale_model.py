"""The scale model: its arithmetic, and that the page shows what it computes."""

from __future__ import annotations

import pytest

from benchmarks.scale_model import (
    BEGIN,
    END,
    INPUTS,
    PAGE,
    Input,
    main,
    model,
    read_inputs,
    rendered,
    shown,
    with_model,
)

GIVEN = {known.name: known.value for known in read_inputs()}


def test_the_page_shows_the_committed_inputs_and_results() -> None:
    text = PAGE.read_text()
    assert with_model(text, rendered(read_inputs(), model(GIVEN))) == text, (
        "run python -m benchmarks.scale_model --write"
    )


def test_every_input_is_used_named_once_and_has_a_source() -> None:
    inputs = read_inputs()
    assert len({known.name for known in inputs}) == len(inputs)
    for known in inputs:
        assert known.kind in ("given", "measured", "provisional", "chosen", "assumed")
        assert known.source
        changed = model(GIVEN | {known.name: known.value * 1.7})
        assert changed.figures != model(GIVEN).figures, f"{known.name} changes nothing"
        with pytest.raises(KeyError):
            model({name: value for name, value in GIVEN.items() if name != known.name})


def test_what_is_quoted_stands_in_the_file_that_it_is_said_to_come_from() -> None:
    quoted = [known for known in read_inputs() if known.quoted]
    assert len(quoted) >= 5
    for known in quoted:
        assert known.kind == "measured"
        path = known.source.split(":")[0]
        assert known.quoted in (PAGE.parents[1] / path).read_text(), f"{known.name}: {path} says something else by now"


def test_the_arithmetic() -> None:
    small = model(
        GIVEN
        | {
            "users": 8.64e6,
            "events_per_day": 10,
            "peak": 2,
            "busy": 0.5,
            "partitions": 64,
            "cpu_us_per_event": 100,
            "transaction_ms": 0,
            "bytes_per_user": 1000,
            "process_memory_gb": 16,
            "cold_seconds": 10,
            "dirty": 2,
            "store_us_per_record": 0,
            "process_base_gb": 0,
            "records_per_event": 0.5,
            "state_bytes": 2000,
            "replicas": 3,
        }
    ).figures
    assert small["rate"] == 1000
    assert small["peak_rate"] == 2000
    assert small["cores"] == pytest.approx(0.4)
    assert small["processes"] == 2
    assert small["changelog_mean_mb"] == pytest.approx(1.0)
    assert small["users_per_partition"] == 135_000
    assert small["partition_seconds"] == pytest.approx(2.7)
    assert small["cold_seconds"] == pytest.approx(86.4)
    assert small["refreshes"] == pytest.approx(GIVEN["refreshes"])


def test_the_fullest_process_fits_into_its_memory() -> None:
    assert model(GIVEN).figures["fullest_gb"] < GIVEN["process_memory_gb"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (28.94, "28.9"), (0.99, "0.99"), (1820.9, "1,821"), (1e9, "1,000,000,000")]
)
def test_numbers_are_shown_short(value: float, text: str) -> None:
    assert shown(value) == text


def test_other_inputs_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--set", "users=1e6"])
    printed = capsys.readouterr().out
    assert "| viewers | 1,000,000 | given | --set |" in printed
    assert printed.rstrip().splitlines()[-1].startswith('{"events_day":30000000')
    with pytest.raises(SystemExit):
        main(["--set", "nobody=1"])


def test_a_page_without_marks_is_refused() -> None:
    assert with_model(f"a{BEGIN}b{END}c", "new") == f"a{BEGIN}\n\nnew\n{END}c"
    with pytest.raises(ValueError, match="the page has no"):
        with_model("a", "new")


def test_inputs_are_committed_beside_the_model() -> None:
    assert INPUTS.exists()
    assert all(isinstance(known, Input) for known in read_inputs())
