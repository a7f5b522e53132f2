"""What the steps' commands share."""

from __future__ import annotations

import argparse
import sys


def say(text: str) -> None:
    """Progress, for people: standard output is for figures."""
    print(text, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """An argument that counts something. Raises argparse.ArgumentTypeError below 1, ValueError for no number."""
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1")
    return count
