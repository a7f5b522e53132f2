"""The setting `event_decoder` names a function; a wrong name is refused at start, with what to write."""

from __future__ import annotations

import pytest

from agents.event_decoder import load_decoder
from agents.settings import SettingsError


def test_it_loads_the_named_function() -> None:
    assert load_decoder("json:loads")(b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("json", "must be module:function"),
        (":loads", "must be module:function"),
        ("json:", "must be module:function"),
        ("no_such_module:loads", "cannot import no_such_module"),
        ("json:no_such_function", "json has no function no_such_function"),
        ("json:__doc__", "json has no function __doc__"),
    ],
)
def test_a_wrong_name(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_decoder(name)
