"""One viewer's state: a fixed-layout record, so that storing it is copying its bytes.

A state is a 0-dimensional numpy array of dtype `STATE`. Every update works on the array itself, so its stored precision
is part of the arithmetic: the same events give the same bytes however they are split into batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from streams.packing import FORMAT, PackingError, Words, bitmap_words, pack_into, pack_with, unpack

SLOTS: Final = 20
"""Clusters held per viewer; the weakest makes room for a new one."""
RING: Final = 16
"""Last events held per viewer, for duplicates, heartbeats and retraction."""
EVIDENCE: Final = 2
EXPERTS: Final = 5
"""Experts of the estimator's mixture (streams/mixture.py)."""
COUNTS: Final = EXPERTS - 1
"""Sets of counts behind them: the first two experts share one."""
RECENT: Final = 8
"""Last watches' clusters held for the session model."""
STATED: Final = 5
"""Most interests that a persona states."""
HIDDEN: Final = 16
PINNED: Final = 8
EMPTY: Final = -1

OPTED_OUT: Final = 1
"""Flag: nothing of this viewer is counted."""
BOOTSTRAPPED: Final = 2
"""Flag: history was loaded since the last request; the end of the load requests one persona."""

State: TypeAlias = npt.NDArray[np.void]

UNIT: Final = 1 / 8192
"""In which a state holds weights of single events, as 16-bit integers."""

_STUB_FIELDS: Final = [
    ("format", "<u2"),
    ("flags", "<u2"),
    ("epoch", "<u4"),  # grows with every erasure
    ("sequence", "<u4"),  # requests emitted, removals included
    ("registry", "<u4"),  # version whose clusters the slots hold; 0: none yet
    # Applied markers: an input record at or before its marker was applied already.
    ("watch_topic", "<u8"),
    ("watch_offset", "<i8"),
    ("watch_partition", "<i4"),
    ("audience", "<u4"),
    ("control_topic", "<u8"),
    ("control_offset", "<i8"),
    ("last_ts", "<i8"),
    # Controls.
    ("hidden", "<i4", (HIDDEN,)),
    ("pinned", "<i4", (PINNED,)),
]
STATE: Final = np.dtype(
    [
        *_STUB_FIELDS,
        # What was counted.
        ("events", "<u4"),
        ("qualifying", "<u4"),
        ("first_ts", "<i8"),
        ("unassigned", "<f4"),
        # The session in progress.
        ("session_key", "<u8"),
        ("session_ts", "<i8"),
        # The reference is the distribution that the last request described.
        ("student_sequence", "<u4"),  # sequence of the first request above the student's gate; 0: none yet
        ("reference_rest", "<f8"),  # of the clusters without a slot, per unit of the population's share
        ("reference_n_eff", "<f4"),
        ("regret", "<f8"),  # squared divergence since that request, in bits squared times watches
        ("request_ts", "<i8"),
        ("since_request", "<u4"),  # qualifying watches since
        ("request_rule", "u1"),  # place of its rule in Rule
        # The estimator: see streams/mixture.py.
        ("experts", "u1"),  # in use
        ("restarts", "<u4"),
        ("since_restart", "<f4"),  # fresh draws
        ("kinds", "<f4", (3,)),  # expected fresh draws, repeats and session echoes so far, prior included
        ("recent", "<i4", (RECENT,)),  # clusters of the last watches, newest first
        ("expert_weight", "<f4", (EXPERTS,)),
        ("expert_prior", "<f4", (EXPERTS,)),
        ("total", "<f4", (COUNTS,)),
        ("spread", "<f4", (COUNTS,)),
        ("born", "<u4", (COUNTS,)),  # restarts so far when its counting began
        # What the last request stated: clusters, and since when each is stated, ms.
        ("stated", "<i4", (STATED,)),
        ("stated_from", "<i8", (STATED,)),
        # Clusters, one slot each.
        ("cluster", "<i4", (SLOTS,)),
        ("short", "<f4", (SLOTS,)),
        ("long", "<f4", (SLOTS,)),
        ("negative", "<f4", (SLOTS,)),
        ("reference", "<f4", (SLOTS,)),
        ("in_session", "<u2", (SLOTS,)),
        ("count", "<f4", (COUNTS, SLOTS)),  # fresh draws
        ("evidence_video", "<u8", (SLOTS, EVIDENCE)),  # newest first
        ("evidence_ts", "<i8", (SLOTS, EVIDENCE)),
        # The last events, newest at ring_next - 1. Weights are in UNIT.
        ("ring_next", "u1"),
        ("ring_used", "u1"),
        ("ring_key", "<u8", (RING,)),
        ("ring_video", "<u8", (RING,)),
        ("ring_ts", "<u4", (RING,)),  # seconds
        ("ring_cluster", "<i4", (RING,)),
        ("ring_weight", "<i2", (RING,)),  # what the event weighs
        ("ring_counted", "<i2", (RING,)),  # how much of it was counted; negative: as a dislike
        ("ring_draw", "<i2", (RING,)),  # how much of a fresh draw it was
        ("ring_restarts", "u1", (RING,)),  # restarts before it, modulo 256
    ]
)
STUB_BYTES: Final = np.dtype(_STUB_FIELDS).itemsize
"""Length of the first fields: all that is left of a viewer who was away for long (streams/ageing.py)."""
WORD: Final = np.dtype("<u4")
WORDS: Final = STATE.itemsize // WORD.itemsize

MARKERS: Final = ("watch_topic", "watch_partition", "watch_offset", "control_topic", "control_offset")
_KEPT_ON_RESET: Final = ("format", "epoch", "sequence", *MARKERS)
"""What outlives an erasure: nothing that says what was watched."""


class StateError(ValueError):
    """Stored bytes are not a state this version reads."""


def new_state() -> State:
    """The state of a viewer never seen: zeros, empty slots, markers before every offset."""
    state: State = np.zeros((), dtype=STATE)
    state["format"] = FORMAT
    for name in ("cluster", "hidden", "pinned", "stated", "recent", "ring_cluster"):
        state[name] = EMPTY
    state["watch_offset"] = -1
    state["control_offset"] = -1
    return state


def to_bytes(state: State) -> bytes:
    """The stored value, see streams/packing.py."""
    return pack(np.atleast_1d(state).view(WORD).reshape(1, WORDS))[0]


def pack(records: Words) -> list[bytes]:
    """Stored values of states given as (states, WORDS)."""
    return pack_with(pack_into, records, EMPTY_WORDS)


def from_bytes(value: bytes) -> State:
    """A private, writable copy of a stored value, of this layout or an earlier one.

    Raises StateError for bytes that are neither.
    """
    return from_values([value]).reshape(())


def from_values(values: Sequence[bytes]) -> npt.NDArray[np.void]:
    """States of stored values, (values,) STATE. Raises StateError as `from_bytes` does."""
    try:
        return unpack(values, EMPTY_WORDS).view(STATE).reshape(len(values))
    except PackingError:
        return unpack([_current(value) for value in values], EMPTY_WORDS).view(STATE).reshape(len(values))


def _current(value: bytes) -> bytes:
    found = int.from_bytes(value[:2], "little")
    if found == 2 and len(value) == _FORMAT_2.itemsize:
        return _from_format_2(value)
    try:
        unpack([value], EMPTY_WORDS)
    except PackingError as error:
        raise StateError(
            f"state of layout {found}, {len(value)} bytes: {error}; this version reads layout {FORMAT}, and layout 2 "
            f"of {_FORMAT_2.itemsize} bytes: a newer version wrote it, or something else did"
        ) from None
    return value


EMPTY_WORDS: Final = new_state().reshape(1).view(WORD)
"""The state of a viewer never seen, (WORDS,): stored values are differences from it."""
LONGEST_STUB: Final = (1 + bitmap_words(WORDS)) * WORD.itemsize + STUB_BYTES
"""Bytes of a stored stub, at most."""


def reset(state: State, *, epoch: int, flags: int = 0) -> State:
    """An empty state that keeps only markers and the request sequence: the content-free stub of an erased viewer."""
    stub = new_state()
    for name in _KEPT_ON_RESET:
        stub[name] = state[name]
    stub["epoch"] = epoch
    stub["flags"] = flags
    return stub


def slot_of(state: State, cluster: int) -> int:
    """Index of a cluster's slot, or -1."""
    found = np.nonzero(state["cluster"] == cluster)[0]
    return int(found[0]) if found.size and cluster >= 0 else -1


def members(ids: Any) -> frozenset[int]:  # noqa: ANN401
    """Cluster ids of a `hidden` or `pinned` field."""
    return frozenset([i for i in (ids if isinstance(ids, list) else ids.tolist()) if i >= 0])


_FORMAT_2_FIELDS: Final = (
    "format flags epoch sequence student_sequence watch_topic watch_partition audience watch_offset control_topic "
    "control_offset registry events qualifying first_ts last_ts unassigned session_key session_ts reference_rest "
    "reference_n_eff regret request_ts since_request request_rule experts restarts since_restart kinds recent "
    "expert_weight expert_prior total spread born hidden pinned stated stated_from cluster short long negative "
    "reference in_session count evidence_video evidence_ts ring_next ring_used ring_key ring_video ring_ts "
    "ring_cluster ring_weight ring_counted ring_draw ring_restarts"
)
_IN_UNITS: Final = ("ring_weight", "ring_counted", "ring_draw")
_FORMAT_2: Final = np.dtype(
    [
        (name, "<i8", (RING,))
        if name == "ring_ts"
        else (name, "<f4", (RING,))
        if name in _IN_UNITS
        else (name, STATE[name])
        for name in _FORMAT_2_FIELDS.split()
    ]
)


def _from_format_2(value: bytes) -> bytes:
    old, state = np.frombuffer(value, _FORMAT_2).reshape(()), new_state()
    for name in _FORMAT_2_FIELDS.split():
        if name in _IN_UNITS:
            state[name] = np.round(old[name] / UNIT)
        else:
            state[name] = old[name] // 1000 if name == "ring_ts" else old[name]
    state["format"] = FORMAT
    return to_bytes(state)
