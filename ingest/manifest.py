"""The manifest of a block: what span of the topic it holds, under which policy, in which files.

A manifest is a file in git. Its commit on the lane's ref is the only moment at which a block comes to exist.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ingest.errors import RepositoryError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    # Unknown fields are ignored: a newer writer may add some, an older reader must still read its blocks.
    model_config = ConfigDict(frozen=True, extra="ignore")


class OffsetRange(_Part):
    """Offsets `[start, end)` of one partition."""

    partition: Count
    start: Count
    end: Count

    @model_validator(mode="after")
    def _forward(self) -> Self:
        if self.end < self.start:
            raise ValueError(f"partition {self.partition}: end {self.end} before start {self.start}")
        return self

    @property
    def span(self) -> int:
        """Number of offsets; public, unlike the number of accepted records."""
        return self.end - self.start


class Counts(_Part):
    """What became of the messages of the span. Exact, so they stay in the data repository."""

    sealed: Count
    rejected: Count
    duplicate: Count
    set_aside: Count

    @property
    def total(self) -> int:
        """Messages read, the contract's `in`."""
        return self.sealed + self.rejected + self.duplicate + self.set_aside


class DataFile(_Part):
    """One Parquet file of a block; `path` is relative to the data repository's root.

    `rejects` holds no records but the bytes of rejected messages too large for the dead-letter topic.
    """

    path: str
    sha256: Sha256
    split: Literal["train", "holdout", "set_aside", "rejects"]


class FrozenPolicy(_Part):
    """The privacy policy a block was sealed under: `ingest` freezes it, `privacy` understands it."""

    # Kept whole, also what a newer version adds: the ledger compares it with what it knows of the block.
    model_config = ConfigDict(frozen=True, extra="allow")

    unit: Literal["record", "user"]
    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    orders: tuple[int, ...]
    caps: tuple[float, ...]
    horizon: str
    attempts: Annotated[int, Field(ge=1)]
    replay_share: Annotated[float, Field(ge=0, lt=1)]
    holdout_share: Annotated[float, Field(ge=0, lt=1)]
    nominal_units: Count


class Manifest(_Part):
    """One sealed block."""

    block_id: str
    stream: str
    lane: str
    seq: Annotated[int, Field(ge=1)]
    topic: str
    incarnation: str
    offsets: Annotated[tuple[OffsetRange, ...], Field(min_length=1)]
    schema_version: int
    suite_sha256: Sha256
    counts: Counts
    files: tuple[DataFile, ...]
    nonce: Annotated[str, Field(pattern=r"^[0-9a-f]{32,}$")]
    policy: FrozenPolicy
    sealed_at: str = ""

    @model_validator(mode="after")
    def _nominal(self) -> Self:
        if self.policy.nominal_units != self.nominal_units:
            raise ValueError(f"policy.nominal_units={self.policy.nominal_units}, offsets span {self.nominal_units}")
        return self

    @property
    def nominal_units(self) -> int:
        """Offsets spanned over all partitions: the public size of the block."""
        return sum(part.span for part in self.offsets)

    @property
    def next_offsets(self) -> dict[int, int]:
        """Where the next block of this lane starts, by partition."""
        return {part.partition: part.end for part in self.offsets}

    def file(self, split: str) -> DataFile | None:
        """The block's file of one split; None when that split is empty."""
        return next((file for file in self.files if file.split == split), None)

    def to_json(self) -> bytes:
        """The file as it stands in git: sorted, indented, one newline at the end."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read a manifest.

        Raises:
            RepositoryError: the bytes are no manifest of version 1.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            raise RepositoryError(
                f"manifest: {where}: {first['msg']}; restore the data repository from its backup"
            ) from None
