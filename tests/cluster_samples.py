"""A fast stand-in for the sentence encoder, and a small catalogue with clear topics."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from agents.clusters.catalogue import Catalogue, catalogue_of
from agents.clusters.embedding import Progress, Vectors, unit_length

WORDS = {
    "sourdough baking": ["starter", "crumb", "proofing", "loaf", "flour", "oven", "crust", "hydration"],
    "jazz guitar": ["chords", "voicings", "bebop", "swing", "improvisation", "standards", "arpeggio", "comping"],
    "trail running": ["summit", "ultra", "shoes", "vest", "elevation", "mud", "pacing", "ridge"],
    "chess endgames": ["rook", "pawn", "king", "opposition", "zugzwang", "bishop", "fortress", "queen"],
}
VIDEOS_PER_TOPIC = 12


class WordVectors:
    """Embeds a text as the sum of one fixed random vector per word."""

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        if progress is not None:
            progress(len(texts), len(texts))
        return unit_length(np.stack([np.sum([_word(word) for word in text.lower().split()], axis=0) for text in texts]))


def _word(word: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    seed = int.from_bytes(blake2b(word.strip(".,").encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).normal(size=48)


def rows(per_topic: int = VIDEOS_PER_TOPIC) -> list[dict[str, object]]:
    """Videos of four topics; the id tells the topic: `jazz-guitar-3`."""
    found: list[dict[str, object]] = []
    for topic, words in WORDS.items():
        for number in range(per_topic):
            title = f"{words[number % 8]} and {words[(number * 3 + 1) % 8]} number {number} (1999)"
            found.append({"video_id": f"{topic.replace(' ', '-')}-{number}", "title": title, "tags": [topic]})
    return found


def catalogue(per_topic: int = VIDEOS_PER_TOPIC) -> Catalogue:
    return catalogue_of("sample", rows(per_topic))


def topic_of(video_id: str) -> str:
    return video_id.rpartition("-")[0].replace("-", " ")
