"""What the model front and an engine say to each other. Imports nothing but the standard library."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Protocol

DEFAULT_MAXIMUM_TOKENS: Final = 32
"""Output tokens when a request does not say; the same as TensorRT-LLM's default."""
GUIDE_TYPES: Final = ("json", "regex", "ebnf_grammar")


class BadRequest(ValueError):  # noqa: N818
    """The request itself cannot be served, now or later; the message says which input and why."""


class EngineFailed(RuntimeError):  # noqa: N818
    """The engine broke while it worked on a request; the same request may succeed later."""


class EngineClosed(RuntimeError):  # noqa: N818
    """The engine is stopping; try another server, or this one after its restart."""


class ModelConfigError(ValueError):
    """The model cannot be loaded as configured; the message names the parameter and what it accepts."""


@dataclass(frozen=True, slots=True)
class Guide:
    """A constraint on the output. kind: one of GUIDE_TYPES; text: JSON schema, regular expression or grammar."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Generation:
    """One request. maximum_tokens >= 1; temperature 0 is greedy; seed only matters above it."""

    prompt: str
    maximum_tokens: int = DEFAULT_MAXIMUM_TOKENS
    temperature: float = 0.0
    seed: int = 0
    guide: Guide | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """One answer. finish_reason: stop, length or cancelled."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int


Finished = Callable[[Generated | Exception], None]
"""Called once per request, from any thread."""


class Engine(Protocol):
    """Runs many generations at once. All methods may be called from any thread."""

    def start(self, key: int, generation: Generation, finished: Finished) -> None:
        """Begin `generation` under a key that is unique among those in flight. BadRequest or EngineClosed refuse it."""

    def cancel(self, key: int) -> None:
        """Free what `key` holds; it then finishes with reason `cancelled`. An unknown key is ignored."""

    def close(self) -> None:
        """Stop; whatever is still in flight finishes with EngineClosed."""


@dataclass(frozen=True, slots=True)
class ModelParameters:
    """Parameters of config.pbtxt, each overridden by the environment variable STUDENT_<NAME>."""

    engine: str
    weights: str
    maximum_in_flight: int
    maximum_input_tokens: int
    maximum_output_tokens: int
    cache_gigabytes: int

    @classmethod
    def read(cls, model_config: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> ModelParameters:
        """Read them. Raises ModelConfigError when one is missing or is not a positive integer where it must be."""
        environment = os.environ if environment is None else environment
        given = {name: entry["string_value"] for name, entry in model_config.get("parameters", {}).items()}
        values: dict[str, Any] = {}
        for field in fields(cls):
            variable = f"STUDENT_{field.name.upper()}"
            # An unset variable that is passed on arrives as an empty text.
            text = environment.get(variable) or given.get(field.name)
            if text is None:
                raise ModelConfigError(f"parameter {field.name} is missing in config.pbtxt and {variable} is not set")
            values[field.name] = text if field.type == "str" else _positive(variable, text)
        return cls(**values)


def _positive(variable: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ModelConfigError(f"{variable}={text!r} must be a whole number of at least 1")
    return value


def load_guides(folder: Path) -> tuple[Guide, ...]:
    """The guides that requests may use: `grammars.json` in the model's version folder, an array of EBNF grammars."""
    path = folder / "grammars.json"
    try:
        grammars = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(grammars, list) or not grammars or not all(isinstance(g, str) and g for g in grammars):
        raise ModelConfigError(f"{path} must be a JSON array of grammars, each a non-empty string")
    return tuple(Guide("ebnf_grammar", grammar) for grammar in grammars)
