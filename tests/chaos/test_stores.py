"""The check of disk stores finds what is wrong."""

from __future__ import annotations

import pytest

from tests.chaos.stores import disagreement

NEWEST = {b"ann": (4, b"a"), b"bob": (5, None), b"cy": (9, b"c"), b"": (6, None)}


def test_a_copy_of_a_prefix_is_right() -> None:
    assert disagreement({b"ann": b"a"}, 7, NEWEST) == []
    assert disagreement({b"ann": b"a", b"cy": b"older"}, 7, NEWEST) == []
    assert disagreement({b"ann": b"a", b"cy": b"c"}, 10, NEWEST) == []


@pytest.mark.parametrize(
    ("items", "offset", "why"),
    [
        ({}, 7, "b'ann' is not what changelog offset 4 says"),
        ({b"ann": b"older"}, 7, "b'ann' is not what changelog offset 4 says"),
        ({b"ann": b"a", b"bob": b"b"}, 7, "b'bob' is not what changelog offset 5 says"),
        ({b"ann": b"a"}, 10, "b'cy' is not what changelog offset 9 says"),
        ({b"ann": b"a", b"dan": b"d"}, 7, "b'dan' was never written to the changelog"),
    ],
)
def test_what_differs_is_said(items: dict[bytes, bytes], offset: int, why: str) -> None:
    assert disagreement(items, offset, NEWEST) == [why]
