"""Contexts of simulated and real viewers: nothing sensitive, nothing twice, and no cluster in both parts."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import orjson
import pytest

from streams.records import encode
from streams.tasks import task_keys
from tests.distillation_samples import interest, summary, topic
from tests.request_samples import sample_request
from triton_models.distillation.contexts import (
    CATALOGUES,
    Cluster,
    Contexts,
    HeldOut,
    held_out_by_hash,
    labels_of,
    main,
    read_catalogue,
    requested,
    simulate,
)
from triton_models.distillation.pairs import Pair, encoded, read_pairs

CLUSTERS = [Cluster(f"craft {chr(97 + n)}{chr(97 + n)}", tuple(f"Title {n} {i}" for i in range(5))) for n in range(24)]
NOTHING: HeldOut = partial(held_out_by_hash, 0.0)
A_THIRD: HeldOut = partial(held_out_by_hash, 0.33)


def simulated(count: int = 200, seed: int = 1, held_out: HeldOut = NOTHING) -> Contexts:
    contexts = Contexts()
    simulate(contexts, "crafts", CLUSTERS, count, seed, held_out)
    return contexts


# Simulated viewers


def test_viewers_have_all_kinds_of_texts_to_be_worded() -> None:
    pairs = simulated(400).learned
    assert len(pairs) == 400
    assert {key for pair in pairs for key in task_keys(pair.task)} == {"1", "a", "s"}
    assert {i.trend for pair in pairs for i in pair.task.interests} == {-1, 0, 1}
    assert {len(n.via_labels) for pair in pairs for n in pair.task.novel} == {0, 1, 2}
    assert {len(pair.task.overview) for pair in pairs if pair.task.overview} == {1, 2, 3, 4, 5}
    assert {pair.text for pair in pairs} == {None}


def test_shares_are_in_steps_of_five_and_the_largest_comes_first() -> None:
    pairs = simulated(400).learned
    shares = [share for pair in pairs for _, share in pair.task.overview]
    shares += [i.share_bucket for pair in pairs for i in pair.task.interests]
    assert {share % 5 for share in shares} == {0}
    assert 5 <= min(shares) < max(shares) <= 100
    assert all(
        [share for _, share in pair.task.overview] == sorted((s for _, s in pair.task.overview), reverse=True)
        for pair in pairs
    )


def test_a_topic_is_not_among_the_interests_that_lead_to_it() -> None:
    assert all(n.label not in n.via_labels for pair in simulated(400).learned for n in pair.task.novel)


def test_no_two_contexts_have_the_same_line() -> None:
    contexts = Contexts()
    assert simulate(contexts, "one", CLUSTERS[:2], 5_000, 1, NOTHING) < 5_000
    assert simulate(contexts, "two", CLUSTERS[:2], 100, 1, NOTHING) < 100
    lines = [pair.line for pair in contexts.learned]
    assert len(set(lines)) == len(lines)
    assert contexts.duplicates > 0


def test_the_same_seed_gives_the_same_contexts_and_more_of_them_the_same_ones_first() -> None:
    assert simulated(100).learned == simulated(100).learned == simulated(300).learned[:100]
    assert simulated(100).learned != simulated(100, seed=2).learned


def test_titles_come_in_random_order_and_now_and_then_some_are_missing() -> None:
    titles = [i.titles for pair in simulated(600).learned for i in pair.task.interests]
    assert {len(own) for own in titles} >= {0, 5}
    full = [own for own in titles if len(own) == 5]
    assert len(full) > 0.8 * len(titles)
    assert len({own[0][-1] for own in full}) == 5


def test_a_catalogue_without_clusters_gives_nothing() -> None:
    assert simulate(Contexts(), "none", [], 10, 1, NOTHING) == 0


# Held out


def test_a_cluster_is_in_one_part_everywhere() -> None:
    contexts = simulated(600, held_out=A_THIRD)
    learned, held_out = (
        {label for p in part for label in labels_of(p.task)} for part in (contexts.learned, contexts.held_out)
    )
    assert learned
    assert held_out
    assert learned.isdisjoint(held_out)
    assert all(map(A_THIRD, held_out))
    assert not any(map(A_THIRD, learned))
    assert any(n.via_labels for pair in contexts.held_out for n in pair.task.novel)


def test_each_part_gets_as_many_contexts_as_it_has_of_the_clusters() -> None:
    contexts = simulated(240, held_out=A_THIRD)
    own = sum(A_THIRD(cluster.label) for cluster in CLUSTERS)
    assert len(contexts.held_out) == 10 * own
    assert len(contexts.learned) == 240 - 10 * own


def test_the_label_alone_decides() -> None:
    labels = [f"label {n}" for n in range(4_000)]
    share = sum(map(A_THIRD, labels)) / len(labels)
    assert 0.30 < share < 0.36
    assert all(A_THIRD(label.upper()) == A_THIRD(label) for label in labels[:100])
    assert all(held_out_by_hash(0.5, label) for label in labels if A_THIRD(label))
    assert not any(map(NOTHING, labels))


def test_the_interests_that_lead_to_a_topic_count_too() -> None:
    assert labels_of(topic("pottery", ("baking", "glass")).task) == ["pottery", "baking", "glass"]
    assert labels_of(summary("baking", "glass").task) == ["baking", "glass"]
    assert labels_of(interest("baking").task) == ["baking"]


@pytest.mark.parametrize(
    "mixed", [topic("pottery", ("held", "learned")), topic("held", ("learned",)), summary("held", "x")]
)
def test_a_context_of_both_parts_belongs_to_neither(mixed: Pair) -> None:
    contexts = Contexts()
    assert not contexts.add(mixed, lambda label: label == "held")
    assert (contexts.learned, contexts.held_out, contexts.mixed) == ([], [], 1)


# Catalogues


def catalogue(tmp_path: Path, *entries: object) -> Path:
    path = tmp_path / "crafts.jsonl"
    path.write_bytes(b"\n".join(map(orjson.dumps, entries)))
    return path


def entry(label: str, *, sensitive: bool = False) -> dict[str, object]:
    return {"label": label, "sensitive": sensitive, "titles": ["One title", "Another title"]}


def test_sensitive_clusters_are_left_out(tmp_path: Path) -> None:
    path = catalogue(tmp_path, entry("basket weaving"), entry("divorce law", sensitive=True))
    assert read_catalogue(path) == [Cluster("basket weaving", ("One title", "Another title"))]


def test_the_packaged_catalogues_can_be_read() -> None:
    files = sorted(CATALOGUES.glob("*.jsonl"))
    assert len(files) == 36
    assert all(len(read_catalogue(path)) >= 15 for path in files)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"label": "a"}, "sensitive"),
        ({"label": "a craft", "sensitive": "no", "titles": []}, "must be true or false"),
        ({"label": "a craft", "sensitive": False, "titles": "Title"}, "list of texts"),
        ({"label": "<|im_end|>", "sensitive": False, "titles": []}, "no words"),
        ({"label": 5, "sensitive": False, "titles": []}, "no words"),
        (["a craft"], "list indices"),
    ],
)
def test_what_is_no_cluster_is_told_with_file_and_line(tmp_path: Path, broken: object, why: str) -> None:
    with pytest.raises(ValueError, match=rf"crafts\.jsonl:2 is no cluster: .*{why}"):
        read_catalogue(catalogue(tmp_path, entry("basket weaving"), broken))


# Requests


def test_requests_give_the_texts_that_their_personas_need_and_no_viewer(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_bytes(encode(sample_request("ann-of-the-hill")) + b"\n")
    pairs = list(requested(path))
    assert [pair.line.split(". ")[0] for pair in pairs] == ["s", "1", "1", "a", "a"]
    assert [label for pair in pairs[1:3] for label in labels_of(pair.task)] == ["italian cooking", "gravel cycling"]
    assert pairs[1].task.interests[0].titles == sample_titles()
    assert {pair.catalogue for pair in pairs} == {"requests"}
    assert b"ann-of-the-hill" not in b"".join(map(encoded, pairs))


def sample_titles() -> tuple[str, ...]:
    context = sample_request().context
    assert context is not None
    return context.interests[0].titles


def test_what_is_no_request_is_told_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"user_id": "ann"}\n')
    with pytest.raises(ValueError, match=r"events\.jsonl: line 1 is no refresh request.*personas replay"):
        list(requested(tmp_path / "events.jsonl"))
    with pytest.raises(ValueError, match=r"cannot use .*missing"):
        list(requested(tmp_path / "missing"))


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["contexts", *map(str, arguments)])
    main()


def test_the_command_writes_both_parts_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (tmp_path / "out", "--catalogues", CATALOGUES / "calm.jsonl", CATALOGUES / "dance.jsonl")
    run(monkeypatch, *arguments, "--count", 40, "--hold-out", 0.2)
    figures = orjson.loads(capsys.readouterr().out.splitlines()[-1])
    learned, held_out = (list(read_pairs([tmp_path / "out" / f"{part}.jsonl"])) for part in ("learned", "held_out"))
    assert (figures["learned"], figures["held_out"]) == (len(learned), len(held_out))
    assert len(learned) > len(held_out) > 0
    assert len(learned) + len(held_out) == 80
    assert {pair.catalogue for pair in learned} == {"calm", "dance"}
    before = [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out").iterdir())]
    run(monkeypatch, *arguments, "--count", 40, "--hold-out", 0.2)
    assert [(path.name, path.read_bytes()) for path in sorted((tmp_path / "out").iterdir())] == before


def test_the_clusters_of_a_catalogue_can_be_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [entry("italian cooking"), entry("SOURDOUGH bread", sensitive=True)]
    requests = tmp_path / "requests.jsonl"
    requests.write_bytes(encode(sample_request()) + b"\n")
    run(monkeypatch, tmp_path, "--requests", requests, "--hold-out", catalogue(tmp_path, *names))
    learned, held_out = (list(read_pairs([tmp_path / f"{part}.jsonl"])) for part in ("learned", "held_out"))
    assert [labels_of(pair.task) for pair in learned] == [["gravel cycling"], ["bikepacking trips", "gravel cycling"]]
    assert [labels_of(pair.task) for pair in held_out] == [["italian cooking"], ["sourdough bread", "italian cooking"]]


@pytest.mark.parametrize("value", ["1", "-0.1", "nan", "no-such-file"])
def test_a_wrong_share_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    with pytest.raises(SystemExit, match=r"error: (--hold-out .* 0 to below 1|cannot read no-such-file)"):
        run(monkeypatch, tmp_path, f"--hold-out={value}")
    assert list(tmp_path.iterdir()) == []
