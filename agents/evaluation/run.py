"""The evaluation: what is worded, what is measured of it, and the figures of the command's last line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agents.clusters.embedding import Embedder
from agents.compiled import worker_kernel
from agents.evaluation import leakage
from agents.evaluation.answers import Shared, Worded, form_of, templated, together, word_each, word_in_turn
from agents.evaluation.cases import Case, Cases, consecutive
from agents.evaluation.consistency import changes, separation
from agents.evaluation.failure_modes import main_missed, novel_consumed, outdated, repeated, sporadic
from agents.evaluation.faithfulness import faithfulness
from agents.evaluation.hostile import Trial, Twin, breakouts, packaged_twins, twin_cases
from agents.evaluation.viewers import held_out_platforms, joined, packaged_cases, stream_requests
from agents.settings import Settings
from agents.student_client import StudentClient
from streams.records import RefreshRequest
from streams.watch import Kernel

IN_TURN: Final = 60
"""Cases that are worded once more over one store, to compare incremental wording with full."""
BASE_CASES: Final = 60
HOSTILE: Final = 120
"""Hostile titles that are tried, evenly spread over the packaged ones, which are in the order of their sorts; and all
that were written unseen."""
AGAIN: Final = 4
"""Every so many twins the clean one is worded twice."""
HALF_SHIFT: Final = 0.5
"""Share of the taste that changes in the viewers that total shifts are set beside."""
STREAM: Final = 10_500
STREAM_VIEWERS: Final = 4_200
COMPILE_FROM: Final = 200
"""Viewers of the stream from which compiling the kernel pays."""
STREAM_EDGES: Final = (100, 1_000, 5_000, 10_000, 10_500)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Material:
    """What is evaluated on. stream: requests of one large platform, for the cache alone.

    topics_only: requests with topics and no interests, left out since the writer does not ask the student for them;
    half: cases of viewers of whom half the taste changes.
    """

    cases: Sequence[Case]
    twins: Sequence[Twin]
    stream: Sequence[RefreshRequest]
    topics_only: int
    half: Sequence[Case] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything that was worded. full: the cases of `in_turn`, each from nothing.

    base: first answers of the base model; canaries: each from nothing; canaries_in_turn: the same over one store, so
    with one cache.
    """

    worded: Sequence[Worded]
    in_turn: Sequence[Worded]
    full: Sequence[Worded]
    canaries: Sequence[Worded]
    canaries_in_turn: Sequence[Worded]
    trials: Sequence[Trial]
    base: Sequence[Worded] | None = None


def gather(
    settings: Settings, embedder: Embedder, viewers: int, seed: int, own: Cases | None, say: Say, *, page: bool
) -> Material:
    """The packaged material; with `own` cases in place of the simulated viewers' if there are any.

    page: with what the report alone needs.
    """
    platforms = held_out_platforms()
    if own is None:
        say(f"simulating {viewers} viewers of each of {len(platforms)} held-out catalogues")
        own = packaged_cases(settings, platforms, embedder, viewers, seed)
    say(f"{len(own.cases)} contexts")
    packaged = packaged_twins()
    twins = spread([twin for twin in packaged if not twin.unseen], HOSTILE) + [twin for twin in packaged if twin.unseen]
    if not page:
        return Material(own.cases, twins, (), own.topics_only)
    say(f"simulating {STREAM_VIEWERS:,} viewers of one platform for the wording cache, and viewers of half shifts")
    kernel = _kernel(settings, say) if STREAM_VIEWERS >= COMPILE_FROM else None
    stream = stream_requests(settings, joined(platforms), embedder, STREAM_VIEWERS, seed, kernel)
    half = packaged_cases(settings, platforms, embedder, viewers, seed, HALF_SHIFT).cases
    return Material(own.cases, twins, stream[:STREAM], own.topics_only, half)


async def measure(material: Material, student: StudentClient, say: Say, *, page: bool) -> Measured:
    """Have the student word everything. page: with what the report alone needs."""
    shared = Shared(student)
    worded = await word_each(material.cases, shared, _progress("contexts", say))
    by_request = {one.case.request.request_id: one for one in worded}
    sequence = sequences(material.cases) if page else []
    in_turn = await word_in_turn(sequence, shared, _progress("contexts with the cache on", say))
    canary_cases = leakage.with_canaries(spread(material.cases, leakage.CANARIES))
    pairs = [twin_cases(twin) for twin in material.twins]
    # One queue: small batches at the end of each would take most of the time. What is worded again is not shared.
    twins, again, canaries = await together(
        word_each([case for pair in pairs for case in pair], shared, _progress("hostile titles and their twins", say)),
        word_each([clean for _, clean in pairs[::AGAIN]], student, _progress("twins once more", say)),
        word_each(canary_cases, shared, _progress("canaries", say)),
    )
    canaries_in_turn = await word_in_turn(canary_cases, shared, _progress("canaries over one cache", say))
    repeats = dict(zip(range(0, len(pairs), AGAIN), again, strict=True))
    trials = [Trial(twin, twins[2 * i], twins[2 * i + 1], repeats.get(i)) for i, twin in enumerate(material.twins)]
    full = [by_request[one.case.request.request_id] for one in in_turn]
    return Measured(worded, in_turn, full, canaries, canaries_in_turn, trials)


def figures(measured: Measured) -> dict[str, Any]:
    """The figures of the last line; None where nothing is known of the truth."""
    worded = measured.worded
    forms = [form_of(one) for one in worded]
    change = changes(worded)
    broken = breakouts(measured.trials)
    return {
        "contexts": len(worded),
        "format": _rounded(sum(form.complete for form in forms) / len(forms)),
        "faithfulness": _rounded(faithfulness(worded)),
        "main_missed": _rounded(main_missed(worded).share),
        "sporadic": _rounded(sporadic(worded).share),
        "outdated": _rounded(outdated(worded).share),
        "repeated": _rounded(repeated(worded).share),
        "novel_consumed": _rounded(novel_consumed(worded).share),
        "churn_auc": _rounded(separation(change, lambda one: one.shares)),
        "leaks": len(all_leaks(measured)),
        "hostile": len(measured.trials),
        "breakouts": len(broken),
        "tokens_mean": round(sum(one.tokens for one in worded) / len(worded), 1),
    }


def all_leaks(measured: Measured) -> list[leakage.Leak]:
    """Leaks of all personas that were worded: private titles and personal data, and what crossed between viewers."""
    trials = [one for trial in measured.trials for one in (trial.hostile, trial.clean)]
    canaries = [*measured.canaries, *measured.canaries_in_turn]
    return leakage.leaks([*measured.worded, *measured.in_turn, *canaries, *trials]) + leakage.crossed(canaries)


def sequences(cases: Sequence[Case], limit: int = IN_TURN) -> list[Case]:
    """All cases of some viewers who have several, whole viewers until there are `limit`; viewers spread evenly."""
    users = list(dict.fromkeys(before.user_id for before, _ in consecutive(cases)))
    chosen: list[Case] = []
    for user in spread(users, len(users) if len(users) < limit else limit // 2):
        own = [case for case in cases if case.user_id == user]
        if len(chosen) + len(own) <= limit:
            chosen += own
    return chosen


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances; all if there are no more."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def templates_of(worded: Sequence[Worded]) -> list[Worded]:
    """The same cases as templates word them."""
    return [templated(one.case) for one in worded]


def _kernel(settings: Settings, say: Say) -> Kernel | None:
    say("compiling the kernel, or reading it from where it is kept")
    try:
        return worker_kernel(settings.data_folder / "kernel")
    except OSError as error:
        say(f"going on without, which takes minutes: {error}")
        return None


def _progress(what: str, say: Say) -> Callable[[int, int], None]:
    def done(count: int, of: int) -> None:
        if count == of or count % max(1, of // 10) == 0:
            say(f"{what}: {count} of {of}")

    return done


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
