"""The adapter folder: `adapter.safetensors` (the LoRA matrices) and `adapter.json` (what they belong to, checksums)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

ADAPTER_FOLDER: Final = Path(__file__).with_name("adapter")
WEIGHTS_FILE: Final = "adapter.safetensors"
DESCRIPTION_FILE: Final = "adapter.json"

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


class WeightsError(ValueError):
    """A file of weights is not what it must be; the message says which, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Description:
    """`adapter.json`. The change of a layer's weights is `alpha / rank` times B·A, as in LoRA (Hu et al. 2021)."""

    rank: int
    alpha: float
    base_sha256: str
    """Of the GGUF file it was trained on."""
    adapter_sha256: str
    """Of `adapter.safetensors`."""
    student_sha256: str
    """Of the GGUF file that merging gives, the same on every machine."""


def read_description(folder: Path = ADAPTER_FOLDER) -> Description | None:
    """The folder's description; None: there is no adapter, and the base serves as it is.

    Raises WeightsError for a description that is broken, and for weights that have none.
    """
    path = folder / DESCRIPTION_FILE
    if not path.exists():
        if (folder / WEIGHTS_FILE).exists():
            raise WeightsError(
                f"{folder / WEIGHTS_FILE} has no {DESCRIPTION_FILE}: write it with "
                "`python -m triton_models.distillation.merge BASE STUDENT --seal ALPHA`"
            )
        return None
    try:
        entries = json.loads(path.read_bytes())
        return _checked(entries)
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path} does not describe an adapter: {error}") from error


def write_description(folder: Path, description: Description) -> None:
    """Write `adapter.json`."""
    (folder / DESCRIPTION_FILE).write_text(json.dumps(asdict(description), indent=2) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits. Raises WeightsError when it cannot be read."""
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def _checked(entries: Any) -> Description:  # noqa: ANN401
    if not isinstance(entries, dict):
        raise ValueError("it is no JSON object")
    names = {field.name for field in fields(Description)}
    if entries.keys() != names:
        raise ValueError(f"its entries are {sorted(entries)}, they must be {sorted(names)}")
    rank, alpha = entries["rank"], entries["alpha"]
    if type(rank) is not int or rank < 1:
        raise ValueError(f"rank is {rank!r}, it must be a whole number from 1")
    if type(alpha) not in (int, float) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha is {alpha!r}, it must be a number above 0")
    for name in sorted(names - {"rank", "alpha"}):
        if not isinstance(entries[name], str) or not _SHA256.fullmatch(entries[name]):
            raise ValueError(f"{name} is {entries[name]!r}, it must be 64 hexadecimal digits")
    return Description(**entries)
