"""`personas eval` with a real Triton."""

from __future__ import annotations

import orjson
import pytest
from click.testing import CliRunner

from agents.cli import eval as command
from agents.cli import personas
from agents.evaluation import run
from agents.evaluation.hostile import packaged_twins
from agents.evaluation.viewers import held_out_platforms
from tests.conftest import Stack
from tests.evaluation_samples import WordEmbedder

pytestmark = pytest.mark.stack


def test_a_real_student_is_measured(triton: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_embedder", lambda settings: WordEmbedder())
    platforms = held_out_platforms()[:1]
    twins = packaged_twins()[:1]
    monkeypatch.setattr(run, "held_out_platforms", lambda: platforms)
    monkeypatch.setattr(run, "packaged_twins", lambda: twins)
    monkeypatch.setattr(run, "STREAM_VIEWERS", 5)
    monkeypatch.setattr(run, "IN_TURN", 2)
    result = CliRunner().invoke(personas, ["eval", "--viewers", "1", "--json", "--student", triton.triton_grpc])
    assert result.exit_code == 0, result.output
    figures = orjson.loads(result.stdout.splitlines()[-1])
    assert figures["contexts"] > 0
    assert figures["tokens_mean"] > 0
    assert figures["hostile"] == 1
