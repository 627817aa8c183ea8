"""How far a topic has been read: next offset by partition, for each incarnation the topic has had.

Every lane commits its own with each block; the stream's is the furthest of all of them.
"""

from __future__ import annotations

import json
import operator
from typing import TYPE_CHECKING

from ingest.errors import RepositoryError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Frontier = dict[str, dict[int, int]]
"""Incarnation to partition to next offset."""


def to_json(frontier: Frontier) -> bytes:
    """As it stands in git."""
    value = {name: {str(p): nexts[p] for p in sorted(nexts)} for name, nexts in sorted(frontier.items())}
    return (json.dumps(value, indent=1) + "\n").encode()


def from_json(data: bytes | None) -> Frontier:
    """Read :func:`to_json`; nothing read yet where there is no file.

    Raises:
        RepositoryError: the bytes are no frontier.
    """
    try:
        value: Mapping[str, Mapping[str, int]] = {} if data is None else json.loads(data)
        return {name: {int(p): operator.index(end) for p, end in nexts.items()} for name, nexts in value.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise RepositoryError(f"frontier.json: {error}; restore the data repository from its backup") from None


def furthest(frontiers: Iterable[Frontier]) -> Frontier:
    """What all lanes together have read."""
    merged: Frontier = {}
    for frontier in frontiers:
        for name, nexts in frontier.items():
            into = merged.setdefault(name, {})
            for partition, end in nexts.items():
                into[partition] = max(end, into.get(partition, 0))
    return merged


def advanced(frontier: Frontier, incarnation: str, nexts: Mapping[int, int]) -> Frontier:
    """A lane's frontier after a block of its own."""
    return {**frontier, incarnation: {**frontier.get(incarnation, {}), **nexts}}
