"""The one order that makes a crash harmless: outputs, then state, then offsets.

Outputs carry deterministic ids and states carry the offset that they were last changed by, so whatever a crash leaves
half done is done again without a trace: an output is repeated with the same id, a counted event is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from streams.state_table import Changes
from streams.watch import Batch, Output


class Transport(Protocol):
    """Where a batch becomes durable. Each call returns when its work is acknowledged, or raises."""

    async def produce(self, outputs: Sequence[Output]) -> None:
        """Write outputs; returns when every one is acknowledged."""

    async def write_states(self, partition: int, changes: Changes) -> None:
        """Write changed states to the changelog."""

    async def commit(self, partition: int, next_offset: int) -> None:
        """Make the input offsets before `next_offset` committable."""


async def make_durable(transport: Transport, partition: int, batch: Batch, changes: Changes) -> None:
    """Outputs, then state, then offsets. An error stops before the next step, so no offset passes lost work."""
    if batch.outputs:
        await transport.produce(batch.outputs)
    if changes:
        await transport.write_states(partition, changes)
    await transport.commit(partition, batch.next_offset)
