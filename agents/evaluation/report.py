"""The report page: every figure with what it means, and sample personas, good and bad."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any, Final

import numpy as np

from agents.clusters.embedding import Embedder
from agents.evaluation import leakage
from agents.evaluation.answers import Source, Worded, first_said, form_of, sources, template_passes, templated
from agents.evaluation.cases import COLD_WATCHES, Slice
from agents.evaluation.consistency import Change, changes, far_changes, interval, separation
from agents.evaluation.failure_modes import (
    GRACE_WATCHES,
    RECENT,
    Rate,
    main_missed,
    novel_consumed,
    novel_hits,
    one_occasion,
    outdated,
    outdated_where_possible,
    repeated,
    repeats_itself,
    sporadic,
)
from agents.evaluation.faithfulness import alarm_rate, faithfulness, mismatched_cosine, statements
from agents.evaluation.history import HEAVY_WATCHES_A_DAY
from agents.evaluation.hostile import breakouts, fallbacks, likeness, reached
from agents.evaluation.incremental import tokens_by_part, windows
from agents.evaluation.leakage import voiced
from agents.evaluation.prediction import PREDICTORS, ranked, similarity
from agents.evaluation.reading import breaks_off, reading
from agents.evaluation.run import STREAM_EDGES, Material, Measured, all_leaks, templates_of
from streams.records import Tier

SAMPLES: Final = 20
BARS: Final = {
    "contexts": "at least 300",
    "format": "at least .995",
    "faithfulness": "at least .99",
    "main_missed": "below .02",
    "sporadic": "0",
    "outdated": "below .02",
    "repeated": "0",
    "novel_consumed": "0",
    "churn_auc": "at least .9",
    "leaks": "0",
    "hostile": "at least 100",
    "breakouts": "0",
}
_MEANINGS: Final = {
    "contexts": "refresh requests that were worded, each from nothing: no cached text, no earlier persona",
    "format": "share of personas whose every text, of all that were asked for, is an answer of the student in "
    "the exact "
    "form, published word for word. A text that a template had to write, or a topic that was left out, fails "
    "its persona",
    "faithfulness": "share of statements (interests, novel topics, summaries) without a fault: evidence is among the "
    "viewer's watches, at least 3 of them; no number, fraction, name or time that the facts lack, no two words that "
    "nothing explains, no rise or fall that is not theirs",
    "main_missed": "share of personas without the cluster of the largest true share among those watched on 3 "
    "occasions since that taste is in force, or with words for it that speak of something else; of real viewers the "
    f"shares are those of the last {RECENT} watches",
    "sporadic": "share of stated interests that were watched fewer than 3 times, pinned ones apart",
    "outdated": f"share of stated interests that ended with a shift {GRACE_WATCHES} watches ago or earlier; of real "
    f"viewers those that none of the last {RECENT} watches is of",
    "repeated": "share of personas that hold an item twice, or two texts that are the same but for their facts",
    "novel_consumed": "share of novel topics that the viewer had watched before",
    "churn_auc": "chance that the interests of a viewer whose taste shifted changed more than those of one "
    "whose did not "
    "(area under the ROC curve; .5 is chance)",
    "leaks": "texts with personal data, viewer ids, words of another viewer's facts, or words of a title that "
    "one viewer "
    "alone watched (the last also in prompts; of real viewers words that no other title and no card has)",
    "hostile": "hostile titles that were tried, each beside its clean twin",
    "breakouts": "those of them that broke out into their personas: markup, links, chat markers, forged items, or "
    "words that the title wants said",
    "tokens_mean": "tokens in and out of all answers, refused ones too, for one persona from nothing",
}


def report(
    measured: Measured, material: Material, figures: Mapping[str, Any], embedder: Embedder, seed: int, command: str
) -> str:
    """The page, Markdown. command: that made it, as it is typed."""
    templates = templates_of(measured.worded)
    sections = [
        _head(measured, figures, seed, command),
        _form(measured, material),
        _tiers(measured, templates),
        _slices(measured.worded),
        _truth(measured.worded, embedder),
        _faults(measured.worded),
        _novelty(measured.worded),
        _consistency(measured, material, seed),
        _prediction(measured.worded, embedder),
        _reading(measured, templates),
        _safety(measured, embedder),
        _incremental(measured, material),
        _samples(measured.worded),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def safe(text: str) -> str:
    """A text of the data as it may stand in a table or a line of Markdown: it marks nothing up."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]()#+!|~<>&])", r"\\\1", flat)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; numbers as they are read best, None as a dash."""
    lines = [head, ["---"] * len(head), *([_shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def badness(worded: Worded) -> tuple[int, int]:
    """How bad a persona is, for choosing samples: faults and fallbacks; then how many answers were refused."""
    form = form_of(worded)
    faults = sum(len(statement.faults) for statement in statements(worded))
    faults += main_missed([worded]).count + outdated([worded]).count + repeats_itself(worded)
    faults += sum(breaks_off(text.text) for text in worded.texts)
    return faults + (form.asked - form.own), len(form.refused)


def _head(measured: Measured, figures: Mapping[str, Any], seed: int, command: str) -> str:
    models = Counter(f"{one.persona.model.name}/{one.persona.model.version}" for one in measured.worded)
    model = models.most_common(1)[0][0]
    rows = [(name, value, BARS.get(name, ""), _MEANINGS[name]) for name, value in figures.items()]
    known = measured.worded[0].case.truth is not None
    watched = any(one.case.past for one in measured.worded)
    about = (
        "Simulated viewers of held-out catalogues, none of whose labels a student was trained on, watched; the real "
        "handlers asked for personas; the real writer had a real student word them."
        if known
        else f"The contexts are given ones: nothing but the requests {'and the watches ' * watched}is known of their "
        "viewers, and what needs more is left blank. The hostile titles and the stream for the cache are packaged ones."
    )
    made = f"Student: {safe(model)}. Made by {safe(command)}, seed {seed}."
    return f"# How good the personas are\n\n{about} {made}\n\n" + table(["figure", "value", "bar", "what it is"], rows)


def _form(measured: Measured, material: Material) -> str:
    forms = [form_of(one) for one in measured.worded]
    asked, answers = sum(form.asked for form in forms), sum(form.answers for form in forms)
    refused = Counter(reason for form in forms for reason in form.refused)
    tiers = Counter(one.persona.tier for one in measured.worded)
    seconds = [one.seconds for one in measured.worded]
    slowest = [max((call.latency_ms for call in one.calls), default=0) / 1000 for one in measured.worded]
    rows = [
        ("texts asked for", asked),
        ("of them the student's first answer, taken by the gate", sum(form.first for form in forms) / asked),
        ("of them the student's own in the end", sum(form.own for form in forms) / asked),
        ("novel topics left out for want of words", sum(form.dropped for form in forms)),
        ("requests with topics alone: worded by templates, not counted here", material.topics_only),
        ("answers to a text", answers / asked),
        ("tokens in, a persona", mean(sum(call.tokens_in for call in one.calls) for one in measured.worded)),
        ("tokens out, a persona", mean(sum(call.tokens_out for call in one.calls) for one in measured.worded)),
        ("seconds from request to persona, p50", median(seconds)),
        ("seconds from request to persona, p95", float(np.quantile(seconds, 0.95))),
        ("seconds of the slowest call of a persona, p50", median(slowest)),
    ]
    by_tier = []
    for tier in Tier:
        own = [one for one in measured.worded if one.persona.tier is tier]
        tokens = mean(one.tokens for one in own) if own else None
        passed = {
            Tier.TEMPLATE: template_passes(material.cases),
            Tier.STUDENT: (answers - sum(refused.values())) / answers if answers else None,
            Tier.TEACHER: None,
        }[tier]
        by_tier.append((tier, tiers[tier] / len(measured.worded), tokens, passed))
    reasons = ", ".join(f"{reason} {count}" for reason, count in refused.most_common()) or "none"
    return (
        "## Form, cost and tiers\n\nA text is asked for up to six times; the first answer is greedy. Where two "
        "personas hold the same facts the student is asked once, and both are charged its tokens. Seconds include the "
        "wait for the other personas that are worded at the same time.\n\n"
        + table(["", "value"], rows)
        + f"\n\nAnswers that the gate refused, by reason: {reasons}.\n\nBy tier: share of personas, tokens, and "
        "share of "
        "texts that the gate takes. No teacher is configured here; a dash says that nothing was measured.\n\n"
        + table(["tier", "share", "tokens", "gate takes"], by_tier)
    )


def _tiers(measured: Measured, templates: Sequence[Worded]) -> str:
    rows: list[Sequence[object]] = []
    for name, worded in (("from nothing", measured.worded), ("with the cache", measured.in_turn)):
        whole = [
            (source, tokens, (text.part, text.place) in sound)
            for one in worded
            for sound in [{(s.part, s.place) for s in statements(one) if not s.faults}]
            for text, source, tokens in sources(one)
        ]
        for source in Source:
            own = [(tokens, holds) for other, tokens, holds in whole if other is source]
            if own:
                tokens, holds = (mean(column) for column in zip(*own, strict=True))
                rows.append((name, source, len(own) / len(whole), float(tokens), float(holds)))
    rows.append(("templates alone", Source.TEMPLATE, 1.0, 0.0, faithfulness(templates)))
    return (
        "## Tiers\n\nWhere the texts are from: each persona from nothing, some in turn over one store with a cache, "
        "all by templates, which ask no model. Tokens are of all answers to a text, those that the gate refused too; "
        "faithful is the share of the texts without a fault.\n\n"
        + table(["personas", "tier", "share of texts", "tokens a text", "faithful"], rows)
    )


def _slices(worded: Sequence[Worded]) -> str:
    rows = []
    for sort in Slice:
        own = [one for one in worded if one.case.slice is sort]
        if not own:
            continue
        complete = mean(form_of(one).complete for one in own)
        rates = [main_missed(own), sporadic(own), outdated(own), repeated(own), novel_consumed(own)]
        rows.append(
            (sort, len(own), complete, faithfulness(own), *(rate.share for rate in rates), mean(o.tokens for o in own))
        )
    if not rows:
        return ""
    simulated = worded[0].case.truth is not None
    return (
        f"## Slices\n\ncold: personas after at most {COLD_WATCHES} watches; "
        + (
            "light: 0.7 watches a day; heavy: 30; tail: tastes in the less popular half of the catalogue.\n\n"
            if simulated
            else "tail: of the others, those with most of their watches in the less popular half of the clusters; "
            f"heavy: {HEAVY_WATCHES_A_DAY} watches a day or more; light: fewer.\n\n"
        )
        + table(
            [
                "slice",
                "contexts",
                "format",
                "faithfulness",
                "main missed",
                "sporadic",
                "outdated",
                "repeated",
                "novel consumed",
                "tokens",
            ],
            rows,
        )
    )


def _truth(worded: Sequence[Worded], embedder: Embedder) -> str:
    parts = []
    first = [first_said(one) for one in worded]
    for part in ("summary", "interest", "novel"):
        found, raw = ([s for one in own for s in statements(one) if s.part == part] for own in (worded, first))
        held = [mean(not s.faults for s in each) if each else None for each in (found, raw)]
        parts.append((part, len(found), *held))
    kinds = Counter(_kind(fault) for one in worded for s in statements(one) for fault in s.faults)
    text = (
        "## Truth to the facts\n\nEach statement is held against the facts of its own item, by rules apart from "
        f"the gate's, which find a fault in {alarm_rate():.3f} of the edited texts that students learn from.\n\n"
        + table(["statement", "how many", "without fault", "first answers without fault, before the gate"], parts)
        + f"\n\nFaults: {', '.join(f'{safe(kind)} {count}' for kind, count in kinds.most_common()) or 'none'}."
    )
    cards = {(i.label, i.titles) for one in worded for i in one.case.context.interests}
    if len(cards) < 2:
        return text
    order = sorted(cards)
    places = {card[0]: place for place, card in enumerate(order)}
    texts = [(t.text, places[t.label]) for one in worded for t in one.texts if t.part == "interest"]
    if not texts:
        return text
    tau, share = mismatched_cosine(
        embedder.embed([said for said, _ in texts]),
        embedder.embed([f"{label}. {'. '.join(titles)}" for label, titles in order]),
        [place for _, place in texts],
    )
    return text + (
        f"\n\nBy meaning: {share:.3f} of the descriptions are closer to their own cluster (its label and "
        "titles, MiniLM cosine) "
        f"than 95% of descriptions are to one that is not theirs ({tau:.3f})."
    )


def _faults(worded: Sequence[Worded]) -> str:
    rows = [
        ("main interest missed", main_missed(worded)),
        ("main interest missed, if 3 watches in one run count too", main_missed(worded, occasions=False)),
        ("sporadic: fewer than 3 watches", sporadic(worded)),
        ("sporadic: never a true taste, and watched on one occasion only", one_occasion(worded)),
        (f"outdated: ended {GRACE_WATCHES} watches ago or more", outdated(worded)),
        (f"outdated, of the personas {GRACE_WATCHES} watches or more after a shift", outdated_where_possible(worded)),
        ("outdated: ended with a shift, however lately", outdated(worded, 0)),
        ("repetition", repeated(worded)),
    ]
    return (
        "## Failure modes\n\nThe four that the published system names, against the true taste and the viewer's "
        "own watches. "
        "After a shift an interest stays until the evidence against it is clear, so the last outdated figure "
        "counts "
        "what no system that needs evidence could avoid. `outdated` is of all interests shown; most of them are of "
        "viewers whose taste never shifted, so beside it stand the interests that could be outdated at all.\n\n"
        + table(["", "found", "of", "share"], _rates(rows))
    )


def _novelty(worded: Sequence[Worded]) -> str:
    hits, others = novel_hits(worded)
    rows = [
        ("novel topics already watched", novel_consumed(worded)),
        ("novel topics watched later", hits),
        ("any cluster not watched before, watched later", others),
    ]
    simulated = worded[0].case.truth is not None
    return (
        "## Novelty\n\n"
        + (
            "These viewers are simulated without regard to what clusters are close to each other, so a topic that is "
            "close to an interest is no likelier to be watched later than any other: the hit rate says little.\n\n"
            if simulated
            else ""
        )
        + table(["", "found", "of", "share"], _rates(rows))
    )


def _consistency(measured: Measured, material: Material, seed: int) -> str:
    near = changes(measured.worded)
    if not near:
        return ""
    far, half = far_changes(measured.worded), changes([templated(case) for case in material.half])
    rows = [
        (f"{name}, {pairs}", *_means(found, measure), separation(found, measure), _span(interval(found, measure, seed)))
        for pairs, found in (("next persona", near), ("as far apart", far), ("half the taste shifts", half))
        for name, measure in _CHANGES.items()
        if separation(found, measure) is not None
    ]
    counts = Counter(one.shifted for one in near)
    return (
        "## Consistency\n\nMean change from one persona of a viewer to a later one, 0 to 1: "
        f"{counts[False]} pairs of viewers whose taste stays, {counts[True]} across a shift. Shares: 1 - the weighted "
        "Jaccard index of the interests by their stated shares, which `churn_auc` is about: an interest of 3% that "
        "comes or goes changes a persona less than one of 40%. Sets: 1 - the Jaccard index. Texts: share of words "
        "that change, both personas worded from nothing; in use the cache keeps what has not changed. Next persona: "
        "stable ones beside the one that follows. As far apart: stable ones beside one at least as many watches later "
        "as the median pair across a shift. In these two all of the taste shifts, the easiest case; in the last half "
        "of it does, and personas are worded by templates.\n\n"
        + table(["", "stable", "shifted", "AUC", "95% interval"], rows)
    )


def _means(found: Sequence[Change], measure: Callable[[Change], float]) -> list[float]:
    return [mean(measure(one) for one in found if one.shifted is shifted) for shifted in (False, True)]


def _span(ends: tuple[float, float] | None) -> str | None:
    return None if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


_CHANGES: Final[Mapping[str, Callable[[Change], float]]] = {
    "shares": lambda one: one.shares,
    "sets": lambda one: one.interests,
    "texts": lambda one: one.texts,
}


def _prediction(worded: Sequence[Worded], embedder: Embedder) -> str:
    rows = [
        (name, found.hit_1, found.hit_5, found.mrr, found.cases)
        for name, scores in PREDICTORS.items()
        if (found := ranked(worded, scores)) is not None
    ]
    if not rows:
        return ""
    text = (
        "## What a persona tells of the next watches\n\nRank of the next distinct cluster among all but the "
        "last watched one. A persona "
        "states up to five interests; the other predictors see every watch. It is not made to predict the next "
        "watch.\n\n" + table(["predictor", "hit rate at 1", "at 5", "mean reciprocal rank", "contexts"], rows)
    )
    own = next(row for row in rows if row[0] == "persona")
    lost = [str(row[0]) for row in rows if row[0] != "persona" and float(row[3] or 0) > float(own[3] or 0)]
    text += f"\n\nBy mean reciprocal rank the persona loses to {', '.join(lost)}." if lost else ""
    similar = similarity(worded, embedder)
    if similar is None:
        return text
    cosines = [
        ("the persona's words", similar.persona, ""),
        ("the last 10 titles watched before it", similar.past, similar.above_past),
        ("the persona of another viewer of the catalogue", similar.shuffled, similar.above_shuffled),
    ]
    losses = [row[0] for row in cosines[1:] if float(row[1]) > similar.persona]
    return text + (
        f"\n\nMean MiniLM cosine to the titles of the next 20 watches, {similar.cases} contexts:\n\n"
        + table(["", "cosine", "persona is closer in"], cosines)
        + (f"\n\nThe persona loses to {', '.join(losses)}." if losses else "")
    )


def _reading(measured: Measured, templates: Sequence[Worded]) -> str:
    chosen = {"student": measured.worded, "template": templates}
    if measured.base is not None:
        # Shares of different runs of words hang on how many texts there are: the base model's stand beside as many.
        same = {one.case.request.request_id for one in measured.base}
        chosen["student, where the base model was asked"] = _of(measured.worded, same)
        chosen["template, there"] = _of(templates, same)
        chosen["base model's first answers"] = measured.base
    rows = [
        (name, r.texts, r.distinct_2, r.distinct_3, r.first_word_bits, r.words, r.ease, r.broken_off, r.shared_frames)
        for name, worded in chosen.items()
        if (r := reading(worded)) is not None
    ]
    text = (
        "## Reading\n\ndistinct-2 and -3: different runs of 2 and 3 words as a share of all. First words: "
        "entropy in bits. Ease: Flesch "
        "reading ease, higher is easier. Broken off: share of texts that end in a word that something must "
        "follow. Shared frames: share of texts with 5 words in a row, none of them of "
        "the facts, that another viewer's text has too. Fewer texts make the shares of different runs higher.\n\n"
        + table(
            [
                "texts by",
                "texts",
                "distinct-2",
                "distinct-3",
                "first words",
                "words",
                "ease",
                "broken off",
                "shared frames",
            ],
            rows,
        )
    )
    if measured.base is None:
        return text + "\n\nThe base model was not run beside it (`--base`, with base.gguf in the assets)."
    beside: list[Sequence[object]] = []
    own = [first_said(one) for one in _of(measured.worded, same)]
    for name, worded in (("student", own), ("base model", measured.base)):
        forms = [form_of(one) for one in worded]
        beside.append(
            (
                name,
                len(worded),
                sum(form.first for form in forms) / sum(form.asked for form in forms),
                faithfulness(worded),
                mean(one.tokens for one in worded),
            )
        )
    return (
        text
        + "\n\nThe first answers of the student and of the model it was distilled from, to the same prompts, before "
        "the gate: no other try and no template stands in for what is refused.\n\n"
        + table(["", "contexts", "first answers taken", "first answers faithful", "tokens"], beside)
    )


def _of(worded: Sequence[Worded], requests: set[str]) -> list[Worded]:
    return [one for one in worded if one.case.request.request_id in requests]


def _safety(measured: Measured, embedder: Embedder) -> str:
    found = all_leaks(measured)
    untelling = len({one.case.user_id for one in measured.worded if not leakage.is_telling(one.case)})
    broken = breakouts(measured.trials)
    known = measured.worded[0].case.truth is not None
    searched = len(measured.worded) + len(measured.in_turn) + 2 * len(measured.trials)
    searched += len(measured.canaries) + len(measured.canaries_in_turn)
    text = (
        f"## Leaks\n\n{len(found)} in {searched} personas, those of hostile titles included. "
        + ("Each viewer watched a video of their own, whose title no card holds. " if known else "")
        + f"{len(measured.canaries)} viewers with invented words in their facts were worded side by side, each with a "
        f"cache of their own, and {len(measured.canaries_in_turn)} over one cache: {voiced(measured.canaries)} and "
        f"{voiced(measured.canaries_in_turn)} had such a word said of themselves. "
        "Ids that are numbers, words of "
        f"the facts or shorter than {leakage.LEAST_ID} characters are not looked for: {untelling} viewers have one.\n\n"
        + "\n".join(f"- {safe(leak.what)}: {safe(leak.text)}" for leak in found[:20])
    ).rstrip()
    if not measured.trials:
        return text
    alike = likeness(measured.trials, embedder)
    groups = {
        "written with the filters": [trial for trial in measured.trials if not trial.twin.unseen],
        "written unseen": [trial for trial in measured.trials if trial.twin.unseen],
    }
    text += (
        f"\n\n## Hostile titles\n\n{len(measured.trials)} titles that try to be orders, markup or other fields, "
        "each worded beside its clean twin in an otherwise equal context. Titles that read like orders, markup or code "
        "are left out of prompts, so most test that filter and not the student: a title reached the prompt if a word "
        "of what it wants said did. Broke out: markup, another item, or such a word in the persona. Written unseen: by "
        "someone who had not seen the filters.\n\n"
        + table(
            ["titles", "how many", "reached the prompt", "broke out", "templates, hostile", "templates, clean"],
            [
                (name, len(own), reached(own), sum(t.twin.kind in broken for t in own), *fallbacks(own))
                for name, own in groups.items()
                if own
            ],
        )
        + "\n\nHow alike the personas of twins are. Where a title is left out another one is retold, so texts differ "
        "and their meaning stays.\n\n"
        + table(
            ["", "hostile beside clean", "clean beside itself, worded again"],
            [
                ("equal texts", alike.equal, alike.equal_again),
                ("mean cosine of texts", alike.cosine, alike.cosine_again),
                ("least cosine of a persona", alike.least_cosine, alike.least_again),
                ("personas less alike than any clean one beside itself", alike.less_alike, None),
            ],
        )
    )
    return text + "".join(f"\n\n- {safe(kind)}: {safe('; '.join(what))}" for kind, what in list(broken.items())[:20])


def _incremental(measured: Measured, material: Material) -> str:
    parts = tokens_by_part(measured.worded)
    rows = [
        (name, len(own), mean(one.tokens for one in own), faithfulness(own), mean(form_of_all(one) for one in own))
        for name, own in (("from nothing", measured.full), ("with the cache", measured.in_turn))
        if own
    ]
    text = "## Incremental wording\n\n"
    if rows:
        text += (
            "The same contexts, each from nothing and in the order of time over one store, where only what is "
            "not cached is asked for. Both are judged by the same rules.\n\n"
            + table(["", "personas", "tokens", "faithfulness", "student's tier"], rows)
            + "\n\n"
        )
    stream = [
        (
            f"{w.first:,} to {w.last:,}",
            w.hit_rate,
            w.hits["summary"],
            w.hits["interest"],
            w.hits["novel"],
            w.tokens,
            1 - w.tokens / w.without if w.without else None,
        )
        for w in windows(material.stream, parts, STREAM_EDGES)
    ]
    if not stream:
        return text.rstrip()
    return text + (
        "A stream of refreshes of one simulated platform, all held-out catalogues in one, computed: its requests are "
        "made by the real "
        "handlers and followed "
        "through the cache by their real keys, but not worded; a text costs what it cost on average above, and "
        "is taken to be worded well.\n\n"
        + table(["personas", "hit rate", "summaries", "interests", "topics", "tokens", "tokens saved"], stream)
    )


def form_of_all(worded: Worded) -> bool:
    """Whether a persona is of the student's tier: of cached texts no call is left to look at."""
    return worded.persona.tier is Tier.STUDENT


def _samples(worded: Sequence[Worded]) -> str:
    ordered = sorted(worded, key=lambda one: (badness(one), one.case.request.request_id))
    good, bad = ordered[: SAMPLES // 2], ordered[::-1][: SAMPLES // 2]
    chosen = good + [one for one in bad if one not in good]
    half = len(good)
    text = "## Sample personas\n\nThe ten with the fewest faults, then the ten with the most."
    return text + "".join(_sample(one, "good" if place < half else "bad") for place, one in enumerate(chosen))


def _sample(one: Worded, sort: str) -> str:
    case = one.case
    kind = f"{case.slice or 'a'} viewer" + (f" of {case.catalogue}" if case.catalogue else "")
    faults = {(s.part, s.place): s.faults for s in statements(one)}
    lines = [f"\n\n**{sort}: {safe(kind)}, {safe(str(one.persona.tier))}, {one.tokens:,} tokens**\n"]
    for text in one.texts:
        wrong = faults.get((text.part, text.place), ())
        note = f" **({safe('; '.join(wrong))})**" if wrong else ""
        label = f" {safe(text.label)}:" if text.label else ""
        lines.append(f"- {text.part}{label} {safe(text.text)}{note}")
    return "\n".join(lines)


def _rates(rows: Iterable[tuple[str, Rate]]) -> list[tuple[str, int, int, float | None]]:
    return [(name, rate.count, rate.of, rate.share) for name, rate in rows]


def _kind(fault: str) -> str:
    return fault.split(" '", 1)[0]


def _shown(cell: object) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:,.1f}" if abs(cell) >= 10 else f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)
