"""Constants learned from histories, thresholds from histories without change, and the command that writes both."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from click.testing import CliRunner, Result

from agents import calibration
from agents.artefacts import load_thresholds
from agents.calibration import (
    CHOICES,
    START,
    CalibrationError,
    Histories,
    best_decayed,
    calibrate_on_log,
    decayed_log_loss,
    divergence_null,
    false_per_1k,
    find_threshold,
    joined,
    learn,
    log_losses,
    run,
    shares_of,
    simulated,
    with_shuffled_days,
)
from agents.cli import personas
from agents.clusters.files import PACKAGED, packaged_registry
from agents.settings import Settings
from streams.mixture import Constants, Model
from streams.simulation import Viewer, simulate
from streams.topics import DAY_MS

CLUSTERS = 64
CONSTANTS = load_thresholds(Settings().thresholds).constants
EVEN = Model(CONSTANTS, np.full(CLUSTERS, 1 / CLUSTERS))
FIRST_DAY = 1_767_225_600_000


def histories(viewers: int, seed: int, kind: Viewer) -> Histories:
    return simulated([simulate(kind, np.random.default_rng([80, seed, i])) for i in range(viewers)])


def clusters_of(log: Histories, user: int) -> list[int]:
    found: list[int] = log.clusters[log.part(user)].tolist()
    return found


# Learning


@pytest.mark.parametrize(
    "kind",
    [Viewer(4.0, events=150, stickiness=0.8), Viewer(4.0, events=150, stickiness=0.0, common=40.0)],
    ids=["who repeat much", "who are like each other"],
)
def test_learned_constants_predict_viewers_they_never_saw_better(kind: Viewer) -> None:
    learned_from, held_out = histories(20, 1, kind), histories(40, 2, kind)
    priors = shares_of(learned_from, CLUSTERS)
    rounds: list[str] = []
    constants = learn([(learned_from, priors)], rounds.append)
    assert rounds
    assert all(value in CHOICES[name] for name, value in constants._asdict().items())
    before, after = (log_losses(held_out, Model(chosen, priors))[:, 0] for chosen in (START, constants))
    assert after.sum() < 0.99 * before.sum()
    assert np.mean(after < before) > 0.7


def test_of_equally_good_constants_the_taste_that_predicts_best_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeats can be explained by the taste or by the session; what is within noise of the best goes to the taste."""
    monkeypatch.setattr(calibration, "CHOICES", {"forget": CHOICES["forget"], "session": CHOICES["session"]})
    group = histories(10, 3, Viewer(4.0, events=150)), EVEN.priors
    chosen = learn([group])
    tried = [START._replace(forget=f, session=s) for f in CHOICES["forget"] for s in CHOICES["session"]]
    bits = {constants: log_losses(group[0], Model(constants, group[1])).sum(axis=0) for constants in (*tried, chosen)}
    best = min(bits, key=lambda constants: float(bits[constants][0]))
    assert bits[chosen][1] <= bits[best][1]
    assert bits[chosen][0] <= 1.01 * bits[best][0]


def test_decayed_counts_are_tuned_on_the_histories_they_are_given() -> None:
    log = histories(20, 4, Viewer(4.0, events=150))
    priors = shares_of(log, CLUSTERS)
    half_life, weight = best_decayed(log, priors)
    found = decayed_log_loss(log, half_life, weight, priors)
    assert found < decayed_log_loss(log, 5.0, 80.0, priors)
    assert found > log_losses(log, Model(CONSTANTS, priors))[:, 0].sum() / len(log.clusters)


# Histories without change


def test_shuffling_days_keeps_each_day_as_it_was_and_no_order_over_them() -> None:
    log = histories(5, 5, Viewer(6.0, events=200, shift_at=100, shift_mass=1.0))
    shuffled = with_shuffled_days(log, np.random.default_rng(1))
    assert np.array_equal(shuffled.ts, log.ts)
    assert np.array_equal(shuffled.begins, log.begins)
    for user in range(len(log)):
        days = log.ts[log.part(user)] // DAY_MS
        blocks = [tuple(log.clusters[log.part(user)][days == day]) for day in np.unique(days)]
        after = clusters_of(shuffled, user)
        assert Counter(after) == Counter(clusters_of(log, user))
        assert after != clusters_of(log, user)
        # The same days, each whole and in its own order: taken off the front one by one.
        left = Counter(blocks)
        assert _made_of(tuple(after), left)


def _made_of(sequence: tuple[int, ...], blocks: Counter[tuple[int, ...]]) -> bool:
    """Whether the sequence is all of these blocks, one after the other in any order."""
    if not sequence:
        return not +blocks
    for block in [block for block, count in blocks.items() if count and sequence[: len(block)] == block]:
        blocks[block] -= 1
        if _made_of(sequence[len(block) :], blocks):
            return True
        blocks[block] += 1
    return False


def test_a_shift_is_gone_after_shuffling() -> None:
    log = histories(30, 6, Viewer(4.0, events=300, shift_at=200, shift_mass=0.8))
    rates = [
        false_per_1k(each, run(each, EVEN, 0.03), 200)
        for each in (log, with_shuffled_days(log, np.random.default_rng(1)))
    ]
    assert rates[0] > 3 * rates[1]


@pytest.mark.parametrize("target", [1.0, 3.0])
def test_the_threshold_meets_its_target_in_every_group_and_half_of_it_does_not(target: float) -> None:
    groups = [(histories(40, 7 + i, Viewer(4.0, events=400, clusters=64, stickiness=s)), EVEN)
              for i, s in enumerate((0.0, 0.7))]  # fmt: skip
    threshold = find_threshold(groups, target, 200)

    def worst(value: float) -> float:
        return max(false_per_1k(log, run(log, model, value), 200) for log, model in groups)

    assert worst(threshold) <= target
    assert worst(threshold / 2) > target


def test_a_target_that_no_threshold_meets_is_refused() -> None:
    restless = joined([(np.arange(400) * DAY_MS, np.repeat(np.arange(8), 50))])
    with pytest.raises(CalibrationError, match="even a threshold of 2"):
        find_threshold([(restless, EVEN)], 0.01, 20)
    with pytest.raises(CalibrationError, match="more than 400 watches"):
        false_per_1k(restless, run(restless, EVEN, 1.0), 400)


def test_the_null_table_holds_quantiles_by_sample_size() -> None:
    random = np.random.default_rng(1)
    trace = np.zeros((6_000, 3))
    trace[:, 1] = random.random(6_000)
    trace[:, 2] = np.repeat([3.0, 10.0, 100.0], 2_000)
    trace[2_000:4_000, 1] /= 10
    trace[::7, 1] = -1  # not checked
    table = divergence_null([trace[:3_000], trace[3_000:]])
    assert [size for size, _ in table] == [3.0, 10.0, 100.0]
    # It only ever falls with the size: what the largest shows holds for all below.
    assert [value for _, value in table] == pytest.approx([0.99] * 3, abs=0.01)
    with pytest.raises(CalibrationError, match="fewer than 200 checks"):
        divergence_null([trace[:100]])


# A log


def log_of(viewers: int, watches: int, kind: Viewer | None = None) -> Histories:
    template = Viewer(4.0, clusters=16) if kind is None else kind
    streams = [simulate(template, np.random.default_rng([81, i])) for i in range(viewers)]
    return joined([(np.array(s.ts[:watches]), np.array(s.cluster[:watches])) for s in streams])


@pytest.mark.parametrize(("viewers", "watches", "message"), [(50, 30, "longer log"), (0, 0, "half"), (1, 600, "half")])
def test_a_log_that_is_too_short_is_refused(viewers: int, watches: int, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibrate_on_log("log", log_of(viewers, watches), np.full(16, 1 / 16), 1, 1.4)


VIEWERS, WATCHES = 40, 100


def lines_of(log: Histories) -> list[bytes]:
    """The log as events of videos that the packaged registry knows; each viewer's on days of their own."""
    registry = packaged_registry()
    catalogue = (PACKAGED.parent / "demo_catalogue.jsonl").read_bytes().splitlines()
    videos: dict[int, str] = {}
    for row in catalogue:
        video = orjson.loads(row)["video_id"]
        videos.setdefault(registry.cluster_of(video), video)
    ids = [videos[cluster] for cluster in sorted(set(videos) & set(registry.cards))[:16]]
    lines = []
    for user in range(len(log)):
        part = log.part(user)
        for ts, cluster in zip(log.ts[part].tolist(), log.clusters[part].tolist(), strict=True):
            lines.append((ts, {"user_id": f"viewer-{user}", "video_id": ids[cluster], "ts": ts}))
    return [orjson.dumps(event) for _, event in sorted(lines, key=lambda line: line[0])]


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    return lines_of(log_of(VIEWERS, WATCHES))


@pytest.fixture(autouse=True)
def few_choices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands try few constants, so that they are quick: learning has its tests above."""
    if "invoke" in request.fixturenames:
        monkeypatch.setattr(calibration, "CHOICES", {"fresh": (1.0, 6.0), "discount": (0.2, 0.65)})
        monkeypatch.setattr(calibration, "LEARNED_KINDS", calibration.LEARNED_KINDS[:1])


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `personas` in an empty folder: the command's words, settings and standard input."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str, environment: dict[str, str] | None = None, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(personas, list(words), env=environment, input=stdin)

    return call


def written(folder: Path, lines: Sequence[bytes], name: str = "events.jsonl") -> Path:
    path = folder / name
    content = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def test_a_log_s_thresholds_are_written_and_used(invoke: Any, tmp_path: Path, lines: list[bytes]) -> None:
    events = written(tmp_path, lines)
    done = invoke("calibrate", str(events), "--registry", str(PACKAGED), "--out", "ours.json", "--json")
    assert done.exit_code == 0, done.output
    figures = orjson.loads(done.stdout.splitlines()[-1])
    assert (figures["viewers"], figures["watches"], figures["settled"]) == (VIEWERS, VIEWERS * WATCHES, 40)
    assert figures["bits_model"] < figures["bits_taste"]
    assert (figures["false_per_1k"] or 0.0) <= 5  # None where half of the viewers are too few
    assert f"{VIEWERS * WATCHES:,} watches of {VIEWERS} viewers, 0 lines left out" in done.stderr
    loaded = load_thresholds(tmp_path / "ours.json")
    assert loaded.regret == figures["regret"]
    assert loaded.name.startswith("events.jsonl@")
    document = orjson.loads((tmp_path / "ours.json").read_bytes())
    assert {name: document["calibrated_on"][name] for name in ("seed", "target", "watches")} == {
        "seed": 1, "target": 1.4, "watches": VIEWERS * WATCHES,
    }  # fmt: skip
    replayed = invoke(
        "replay", str(events), "--out", "out", "--registry", str(PACKAGED), "--json",
        environment={"PERSONAS_THRESHOLDS": str(tmp_path / "ours.json")},
    )  # fmt: skip
    assert replayed.exit_code == 0, replayed.output
    assert orjson.loads((tmp_path / "out" / "summary.json").read_bytes())["thresholds"] == loaded.name


def test_the_same_log_gives_the_same_bytes_however_it_comes(invoke: Any, tmp_path: Path, lines: list[bytes]) -> None:
    """From a file, packed, or from standard input; heartbeats, copies, bots and unknown videos change nothing."""
    noise = [
        lines[0],
        orjson.dumps({**orjson.loads(lines[9]), "traffic": "bot"}),
        orjson.dumps({**orjson.loads(lines[9]), "video_id": "unheard of"}),
        orjson.dumps({**orjson.loads(lines[9]), "ts": FIRST_DAY + 7, "watch_fraction": 0.05}),
        b"no event",
    ]
    wanted = ("calibrate", "--registry", str(PACKAGED), "--target", "2", "--out")
    documents = []
    for source, stdin in (
        (written(tmp_path, lines), None),
        (written(tmp_path, [*lines, *noise], "events.jsonl.gz"), None),
        ("-", b"\n".join(lines)),
    ):
        done = invoke(*wanted, "out.json", str(source), stdin=stdin)
        assert done.exit_code == 0, done.output
        document = orjson.loads((tmp_path / "out.json").read_bytes())
        del document["name"], document["calibrated_on"]["source"]
        documents.append(document)
    assert documents[0] == documents[1] == documents[2]


def test_the_heartbeats_of_a_playback_are_one_watch(invoke: Any, tmp_path: Path, lines: list[bytes]) -> None:
    beats = [
        orjson.dumps({**orjson.loads(line), "playback_id": f"p{number}", "watch_fraction": fraction})
        for number, line in enumerate(lines)
        for fraction in (0.2, 0.5, 0.9)
    ]
    done = invoke("calibrate", str(written(tmp_path, beats)), "--registry", str(PACKAGED), "--json")
    assert done.exit_code == 0, done.output
    assert orjson.loads(done.stdout.splitlines()[-1])["watches"] == len(lines)
    assert (tmp_path / "thresholds.json").is_file()


def test_without_a_log_viewers_are_simulated(invoke: Any, tmp_path: Path) -> None:
    done = invoke("calibrate", "--scale", "0.02", "--seed", "5", "--target", "1", "--out", "simulated.json")
    assert done.exit_code == 0, done.output
    loaded = load_thresholds(tmp_path / "simulated.json")
    assert loaded.name.startswith("simulated-1-per-1000")
    assert 0.01 < loaded.regret < 2
    assert isinstance(loaded.constants, Constants)
    assert set(orjson.loads((tmp_path / "simulated.json").read_bytes())["calibrated_on"]["false_per_1k"]) == {
        "light", "medium", "heavy",
    }  # fmt: skip
    again = invoke("calibrate", "--scale", "0.02", "--seed", "5", "--target", "1", "--out", "again.json")
    assert again.exit_code == 0
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "simulated.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.jsonl", b'{"user_id": "ann", "video_id": "v", "ts": 1767225600000}\n', "half of the viewers"),
        ("empty.jsonl", b"", "half of the viewers"),
        ("missing.jsonl", None, "cannot read .*missing.jsonl"),
        ("damaged.jsonl.gz", b"no gzip", "cannot read .*damaged.jsonl.gz"),
    ],
)
def test_a_log_of_no_use_is_one_line(
    name: str, content: bytes | None, message: str, invoke: Any, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    done = invoke("calibrate", name, "--registry", str(PACKAGED))
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert re.search(message, last)
    assert not (tmp_path / "thresholds.json").exists()


def test_a_log_too_short_to_show_a_rate_says_so(invoke: Any, tmp_path: Path, lines: list[bytes]) -> None:
    done = invoke("calibrate", str(written(tmp_path, lines[:1_500])), "--registry", str(PACKAGED))
    assert done.exit_code == 1
    assert "a longer log is needed, or the packaged thresholds" in done.stderr


def test_a_file_that_cannot_be_written_is_known_before_anything_is_done(invoke: Any, tmp_path: Path) -> None:
    done = invoke("calibrate", "--out", str(tmp_path / "none" / "thresholds.json"))
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert "none/thresholds.json" in done.stderr


@pytest.mark.parametrize("words", [["--target", "0"], ["--scale", "0"], ["--seed", "-1"], ["--registry", "none"]])
def test_values_out_of_range_are_wrong_usage(words: list[str], invoke: Any) -> None:
    assert invoke("calibrate", *words).exit_code == 2
