"""How a persona writer behaves: its limits, its budget, and the pauses of everything that is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from streams.teaching import TeacherPolicy


@dataclass(frozen=True, slots=True)
class WriterConfiguration:
    """How the writer behaves.

    look_ahead, upgrade_look_ahead: requests taken and not yet finished; submitting more waits.
    budget_tokens_per_hour: tokens that the student may be paid, 0: no limit; budget_look_ahead: further refreshes that
    may wait for them, a better one makes the worst a template; budget_in_flight: requests worded at once;
    budget_holds_back: requests of a partition that may be taken behind one that waits; further ones make it a template.
    store_patience_seconds: how long a store may be unavailable before the writer fails.
    first_pause_seconds, longest_pause_seconds: bounds of the back-off.
    topic_prefix: put before the source topic in dead letters.
    student_id: name/version of the student that cached wordings are looked up for until an answer tells another one;
    empty while it is not known: then none of a student's are found.
    teacher_policy: which requests a teacher words at once, if there is one.
    """

    look_ahead: int = 64
    upgrade_look_ahead: int = 4
    budget_tokens_per_hour: int = 0
    budget_look_ahead: int = 512
    budget_in_flight: int = 8
    budget_holds_back: int = 4096
    store_patience_seconds: float = 120.0
    first_pause_seconds: float = 0.2
    longest_pause_seconds: float = 15.0
    topic_prefix: str = ""
    student_id: str = ""
    teacher_policy: TeacherPolicy = field(default_factory=TeacherPolicy)


def pause_seconds(failures: int, configuration: WriterConfiguration) -> float:
    """Pause after so many failures in a row: doubled each time up to the longest, times 0.5 to 1 so workers part."""
    doubled = configuration.first_pause_seconds * 2.0 ** min(failures - 1, 32)
    pause = min(configuration.longest_pause_seconds, doubled)
    return pause * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
