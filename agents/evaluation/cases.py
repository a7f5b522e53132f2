"""Cases: refresh requests to be worded, with what is true of their viewers where that is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Final

from streams.decoding import Rejected, decode_request
from streams.records import Command, Context, RefreshRequest

COLD_WATCHES: Final = 40
"""Requests of the cold slice come within so many watches."""


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
    yet; watches_since_shift: watches in the taste in force.
    """

    taste: tuple[float, ...]
    before: tuple[float, ...] | None
    watches_since_shift: int


@dataclass(frozen=True, slots=True)
class Case:
    """A request to be worded. past and future are empty and there is no truth where they are not known.

    past: the viewer's watches up to the request, in order; future: those after it; private: titles that only this
    viewer watched, or words of such titles; catalogue: who shares it shares cluster ids; clusters: all of these ids;
    statable: those that a persona may name; slice: the viewer's, None if nothing of them is known.
    """

    request: RefreshRequest
    catalogue: str = ""
    past: tuple[Watch, ...] = ()
    future: tuple[Watch, ...] = ()
    private: tuple[str, ...] = ()
    truth: Truth | None = None
    clusters: Sequence[int] = ()
    statable: frozenset[int] = frozenset()
    slice: Slice | None = None

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


@dataclass(frozen=True, slots=True)
class Cases:
    """What is to be worded. topics_only: further requests, whose novel topics templates word: see `topics_only`."""

    cases: Sequence[Case]
    topics_only: int = 0


def worded(request: RefreshRequest) -> bool:
    """Whether the writer asks the student for anything: not for removals, tier limits, or topics without interests."""
    return _open(request) and bool(request.context and request.context.interests)


def topics_only(request: RefreshRequest) -> bool:
    """Whether a request has novel topics and no interests: the writer words it plainly, without the student."""
    context = request.context
    return _open(request) and context is not None and bool(context.novel) and not context.interests


def cases_of(requests: Iterable[RefreshRequest]) -> Cases:
    """Cases of which nothing but the requests is known; those that ask the student for nothing are left out."""
    read = list(requests)
    return Cases([Case(request) for request in read if worded(request)], sum(map(topics_only, read)))


def read_cases(lines: Iterable[bytes]) -> list[Case]:
    """Cases of refresh-request records that ask the student for words: see `read_requests`. Raises UnreadableContexts.

    Nothing but the requests is known of them.
    """
    return list(cases_of(read_requests(lines)).cases)


def read_requests(lines: Iterable[bytes]) -> list[RefreshRequest]:
    """Refresh-request records, JSON lines as `personas replay` writes them. Blank lines are skipped.

    Raises UnreadableContexts, also if none of them asks the student for words.
    """
    requests = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = decode_request(line)
        if isinstance(request, Rejected):
            raise UnreadableContexts(
                f"line {number} is no refresh request: {request.reason}: {request.detail}; expected the requests.jsonl "
                "that `personas replay EVENTS --out DIR` writes"
            )
        requests.append(request)
    if not any(map(worded, requests)):
        raise UnreadableContexts("no line asks the student for anything: a viewer needs 20 qualifying watches first")
    return requests


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


def _open(request: RefreshRequest) -> bool:
    return request.command is Command.REFRESH and request.context is not None and request.tier_limit is None
