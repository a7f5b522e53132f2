"""What the demo shows in the terminal while it runs: requests and personas as they land, and one viewer's story."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from rich.console import Console
from rich.text import Text

from agents.cards import bar, persona_line, visible
from agents.demo.viewers import SHIFT_AT, DemoViewer, Taste
from streams.personas import difference
from streams.records import Explanation, Persona, PersonaInterest, RefreshRequest, Rule, Tier

CLAIMS_CHANGE: Final = (Rule.DRIFT, Rule.FOLLOW_UP, Rule.AGE)
"""Rules that a viewer whose taste never changes should not set off."""


@dataclass(slots=True)
class Board:
    """Everything seen on the request and persona topics. Times are append times, ms."""

    requests: dict[str, tuple[RefreshRequest, int]] = field(default_factory=dict)
    personas: list[tuple[Persona, int]] = field(default_factory=list)
    latest: dict[str, tuple[Persona, bytes]] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)
    watches_since_shift: list[int] = field(default_factory=list)

    def seconds(self) -> list[float]:
        """Seconds from request to persona, by append times."""
        return [
            (at - self.requests[persona.request_id][1]) / 1000
            for persona, at in self.personas
            if persona.request_id in self.requests
        ]

    def stable_refreshes(self, viewers: dict[str, DemoViewer]) -> int:
        """Requests that claim a change in viewers whose taste never changes."""
        return sum(
            request.rule in CLAIMS_CHANGE and viewers[request.user_id].stable
            for request, _ in self.requests.values()
            if request.user_id in viewers
        )

    def answered(self) -> bool:
        """Whether each viewer's newest request has its persona."""
        newest: dict[str, RefreshRequest] = {}
        for request, _ in self.requests.values():
            if request.user_id not in newest or request.sequence > newest[request.user_id].sequence:
                newest[request.user_id] = request
        return all(
            user in self.latest and self.latest[user][0].version // 8 >= request.sequence
            for user, request in newest.items()
        )


class Story:
    """Prints what happens. `title_of` gives a video's title."""

    def __init__(self, console: Console, viewers: dict[str, DemoViewer], title_of: Callable[[str], str | None]) -> None:
        self.board = Board()
        self._console = console
        self._viewers = viewers
        self._title_of = title_of
        self._started = time.monotonic()
        self._shifted: set[str] = set()

    def say(self, text: str | Text, style: str = "") -> None:
        """One line with the seconds since the stack was ready."""
        line = Text(f"{time.monotonic() - self._started:6.1f}s  ", style="dim")
        line.append_text(Text(text, style=style) if isinstance(text, str) else text)
        self._console.print(line, soft_wrap=True)

    def on_watch(self, user_id: str, number: int) -> None:
        """A viewer's watch `number` (from 0) was sent."""
        self.board.sent[user_id] = number + 1
        viewer = self._viewers[user_id]
        if number == SHIFT_AT and viewer.after is not None and user_id == "maya":
            self.say(f"maya's taste shifts now, at her watch {number + 1}", "bold yellow")
            self._detail(f"from {_taste(viewer.before)}")
            self._detail(f"to   {_taste(viewer.after)}")
            self._detail("noah, beside her, goes on as he was")

    def on_request(self, request: RefreshRequest, at: int) -> None:
        """A refresh request appeared."""
        if request.request_id in self.board.requests:
            return
        self.board.requests[request.request_id] = (request, at)
        if request.context is None or request.user_id not in ("maya", "noah"):
            return
        explanation = request.context.explanation
        since = explanation.watches_since
        self.say(
            f"{request.user_id}: {request.rule} fired, {explanation.value:g} against a threshold of "
            f"{explanation.threshold:g}, {since} watches since the last request",
            "bold",
        )
        self._moves(explanation)

    def on_persona(self, persona: Persona, body: bytes, at: int) -> None:
        """A persona appeared."""
        before = self.board.latest.get(persona.user_id)
        if before is not None and before[0].version >= persona.version:
            return
        self.board.personas.append((persona, at))
        self.board.latest[persona.user_id] = (persona, body)
        self._note_shift(persona)
        if persona.user_id not in ("maya", "noah"):
            self.say(persona_line(persona))
            return
        request = self.board.requests.get(persona.request_id)
        delay = f", {(at - request[1]) / 1000:.1f} s after its request" if request else ""
        self.say(f"{persona.user_id}: persona of tier {persona.tier}{delay}", "bold green")
        self._detail(visible(persona.summary))
        if before is None:
            for interest in persona.interests:
                self._sentence("  ", interest, "")
            for novel in persona.novel:
                self._detail(f"  try {visible(novel.label)}: {visible(novel.reason)}", "magenta")
            return
        self._difference(before[0], persona)

    def _note_shift(self, persona: Persona) -> None:
        viewer = self._viewers.get(persona.user_id)
        if viewer is None or viewer.after is None or persona.user_id in self._shifted:
            return
        since = self.board.sent.get(persona.user_id, 0) - SHIFT_AT
        if persona.rule in CLAIMS_CHANGE and persona.basis.events > SHIFT_AT:
            self._shifted.add(persona.user_id)
            self.board.watches_since_shift.append(since)
            if persona.user_id == "maya":
                self.say(f"maya's new persona landed {since} watches after her taste shifted", "bold green")

    def _difference(self, before: Persona, persona: Persona) -> None:
        moved = difference(before.interests, persona.interests)
        for interest in moved.removed:
            self._sentence("- ", interest, "red")
        for interest in moved.added:
            self._sentence("+ ", interest, "green")
        for _, interest in moved.reworded:
            self._sentence("~ ", interest, "yellow")
        if moved.kept:
            labels = ", ".join(visible(interest.label) for _, interest in moved.kept)
            self._detail(f"kept word for word: {labels}", "dim")

    def _sentence(self, mark: str, interest: PersonaInterest, style: str) -> None:
        """A sentence with the titles of the videos that back it."""
        label = visible(interest.label)
        self._detail(f"{mark}{label} {bar(interest.share, 10)} {interest.share:.0%}", style)
        self._detail(f"    {visible(interest.description)}", style)
        for evidence in interest.evidence:
            self._detail(f"    · {visible(self._title_of(evidence.video_id) or evidence.video_id)}", "dim")

    def _moves(self, explanation: Explanation) -> None:
        if explanation.divergence is not None:
            null = explanation.divergence_null
            self._detail(
                f"divergence since then {explanation.divergence:.2f} bits; chance alone stays below {null:.2f}"
            )
        for _, label, before, now in (*explanation.risen, *explanation.fallen):
            self._detail(f"{before:6.0%} -> {now:4.0%}  {visible(label)}", "green" if now > before else "red")

    def _detail(self, text: str, style: str = "") -> None:
        self._console.print(Text(f"         {text}", style=style), soft_wrap=True)


def summary_of(board: Board) -> dict[str, float | int | dict[str, int] | None]:
    """The figures of a board, as the demo's last line has them."""
    seconds = sorted(board.seconds())
    tiers = {str(tier): sum(p.tier is tier for p, _ in board.personas) for tier in Tier}
    tokens = [p.model.tokens_in + p.model.tokens_out for p, _ in board.personas]
    items = sum(p.model.items for p, _ in board.personas)
    cached = sum(p.model.items_cached for p, _ in board.personas)
    return {
        "refresh_requests": len(board.requests),
        "personas": len(board.personas),
        "by_tier": {tier: count for tier, count in tiers.items() if count},
        "shift_to_persona_events_p50": round(median(board.watches_since_shift)) if board.watches_since_shift else None,
        "persona_seconds_p50": round(median(seconds), 2) if seconds else None,
        "persona_seconds_p95": round(seconds[int(0.95 * (len(seconds) - 1))], 2) if seconds else None,
        "tokens_per_persona": round(sum(tokens) / len(tokens), 1) if tokens else None,
        "cache_hit_rate": round(cached / items, 3) if items else None,
    }


def _taste(taste: Taste) -> str:
    return ", ".join(f"{topic} {share:.0%}" for topic, share in taste.items())
