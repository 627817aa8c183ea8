"""The steps of sealing a block, in order, each named so that a test can stop a process exactly there.

Between any two of them a SIGKILL must leave every message in one block, in the dead letters, or still on the topic.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class Step(StrEnum):
    """What has just been done with the block under way."""

    POLLED = "polled"
    """Its messages are in memory."""
    VALIDATED = "validated"
    """Contract and suite have judged each."""
    CLAIMED = "claimed"
    """The identities of what is accepted stand in the index, with the offsets that hold them."""
    WRITTEN = "written"
    """Its files are written, perhaps not yet on disk."""
    DEAD_LETTERED = "dead_lettered"
    """All replicas have its rejected messages."""
    SYNCED = "synced"
    """Its files survive a power cut."""
    ADDED = "added"
    """DVC's cache has its files."""
    COMMITTED = "committed"
    """It exists."""
    INDEXED = "indexed"
    """The index knows that it exists."""
    ACKNOWLEDGED = "acknowledged"
    """Kafka's lag monitors know its offsets."""


Tell = Callable[[Step], None]
"""Hears of each step, in the process's own thread."""
