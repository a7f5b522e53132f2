"""The operator's own decoder of watch events, for topics that hold Avro, Protobuf or another format."""

from __future__ import annotations

import importlib

from agents.settings import SettingsError
from streams.decoding import Decoder


def load_decoder(name: str) -> Decoder:
    """The function that a setting like `my_package.events:decode` names: from a value's bytes to a mapping.

    Raises SettingsError if there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise SettingsError(f"event_decoder {name!r} must be module:function, for example my_package.events:decode")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SettingsError(f"event_decoder {name!r}: cannot import {module_name}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SettingsError(f"event_decoder {name!r}: {module_name} has no function {function_name}")
    decoder: Decoder = function
    return decoder
