"""Cases: refresh requests to be worded, with what is true of their viewers where that is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from streams.decoding import Rejected, decode_request
from streams.records import Command, Context, RefreshRequest


class Slice(StrEnum):
    """Sorts of viewers: new ones, few or many watches a day, tastes in the less popular half of the catalogue."""

    COLD = "cold"
    LIGHT = "light"
    HEAVY = "heavy"
    TAIL = "tail"


@dataclass(frozen=True, slots=True)
class Watch:
    """One watch of a simulated viewer; ts in ms."""

    video_id: str
    cluster_id: int
    title: str
    ts: int


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true of a simulated viewer at the request.

    taste: share by cluster id, sums to 1; before: the taste that was in force before the shift, None if there was none
    yet; watches_since_shift: watches in the taste in force; statable: clusters that a persona may name.
    """

    slice: Slice
    taste: tuple[float, ...]
    before: tuple[float, ...] | None
    watches_since_shift: int
    statable: frozenset[int]


@dataclass(frozen=True, slots=True)
class Case:
    """A request to be worded. Without a truth there is nothing but the request: past and future are empty.

    past: the viewer's watches up to the request, in order; future: those after it; private: titles that only this
    viewer watched; catalogue: who shares it shares cluster ids.
    """

    request: RefreshRequest
    catalogue: str = ""
    past: tuple[Watch, ...] = ()
    future: tuple[Watch, ...] = ()
    private: tuple[str, ...] = ()
    truth: Truth | None = None

    @property
    def user_id(self) -> str:
        """The viewer."""
        return self.request.user_id

    @property
    def context(self) -> Context:
        """The request's context; a case always has one."""
        assert self.request.context is not None  # noqa: S101
        return self.request.context


class UnreadableContexts(ValueError):  # noqa: N818 - a state of the file
    """A file of contexts cannot be used; the message says which line and why."""


def worded(request: RefreshRequest) -> bool:
    """Whether the student is asked for anything: not by removals, nor for viewers below the student's gate."""
    context = request.context
    if request.command is not Command.REFRESH or context is None or request.tier_limit is not None:
        return False
    return bool(context.interests or context.novel)


def read_cases(lines: Iterable[bytes]) -> list[Case]:
    """Cases of refresh-request records, JSON lines as `personas replay` writes them; nothing else is known of them.

    Requests that ask the student for nothing are left out. Raises UnreadableContexts.
    """
    cases = []
    for number, line in enumerate(lines, 1):
        request = decode_request(line)
        if isinstance(request, Rejected):
            raise UnreadableContexts(
                f"line {number} is no refresh request: {request.reason}: {request.detail}; expected the requests.jsonl "
                "that `personas replay EVENTS --out DIR` writes"
            )
        if worded(request):
            cases.append(Case(request))
    if not cases:
        raise UnreadableContexts("no line asks the student for anything: a viewer needs 20 qualifying watches first")
    return cases


def consecutive(cases: Sequence[Case]) -> list[tuple[Case, Case]]:
    """Pairs of cases that follow each other in one viewer's life."""
    by_user: dict[str, list[Case]] = {}
    for case in cases:
        by_user.setdefault(case.user_id, []).append(case)
    pairs = []
    for own in by_user.values():
        ordered = sorted(own, key=lambda case: case.request.sequence)
        pairs += list(pairwise(ordered))
    return pairs
