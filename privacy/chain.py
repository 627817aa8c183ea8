"""The rows of the ledger as values, their hashes, and the two chains they form.

Blocks are chained in the order in which they became known; rounds are chained in the order of their steps, and every
step names the head of the blocks' chain at that moment. So the head of the rounds' chain, which a signed receipt
carries, fixes every charge and every policy it was judged by.

A hash covers the canonical JSON (RFC 8785) of a row. It is put together here piece by piece, which gives the very
bytes `privacy.canonical` gives, in a fraction of the time.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any, Literal

import numpy as np
import sqlalchemy as sa

from privacy import accounting, tables
from privacy.accounting import Indices, Mechanism
from privacy.canonical import canonical
from privacy.errors import LedgerBroken, PrivacyError
from privacy.policy import TRAIN

State = Literal["reserved", "started", "committed", "cancelled"]
GENESIS = "0" * 64
# Whole numbers beyond are not JSON (RFC 8785).
_WHOLE_MAX = 2**53 - 1


@dataclass(frozen=True)
class Charge:
    """What one round does to every unit of one block: `steps` draws at rate `q` with noise multiplier `sigma`.

    Raises:
        PolicyError: q is not in [0, 1], sigma is not positive and finite, or steps is not a whole number >= 1.
    """

    block_id: str
    q: float
    sigma: float
    steps: int

    def __post_init__(self) -> None:
        accounting.check_mechanism(self.q, self.sigma, self.steps)
        object.__setattr__(self, "q", float(self.q))
        object.__setattr__(self, "sigma", float(self.sigma))

    @property
    def mechanism(self) -> Mechanism:
        """(q, sigma, steps)."""
        return self.q, self.sigma, self.steps


@dataclass(frozen=True)
class BlockRow:
    """A sealed block that became known; `policy` is the canonical JSON of its frozen policy."""

    seq: int
    block_id: str
    stream: str
    policy: str
    prev_hash: str
    hash: str = ""


@dataclass(frozen=True)
class LedgerRow:
    """One step of one attempt. Charges stand in the `reserved` row; the hash covers them and the row before.

    `account` says whose budget is charged: `train`, or `holdout`. `window` is the number of the window the charges fall
    in, 0 for life. Neither is a part of the hash at its default, so that rows written before they existed still verify.
    """

    seq: int
    stream: str
    round_id: str
    attempt: int
    state: State
    plan_hash: str
    noise_source: str
    adapter_sha256: str
    at: str
    charges: tuple[Charge, ...]
    blocks_head: str
    prev_hash: str
    hash: str = ""
    account: str = TRAIN
    window: int = 0


@dataclass(frozen=True)
class History:
    """The whole ledger as a full audit reads it: both chains verified, charges column by column.

    Attributes:
        blocks: oldest first.
        rows: oldest first. Their `charges` are empty: they stand in the columns.
        first: (R + 1,), the charges of row r are first[r] to first[r + 1].
        block: (N,) index into `blocks`.
        mechanism: (N,) index into `mechanisms`.
        mechanisms: distinct (q, sigma, steps).
    """

    blocks: tuple[BlockRow, ...]
    rows: tuple[LedgerRow, ...]
    first: Indices
    block: Indices
    mechanism: Indices
    mechanisms: tuple[Mechanism, ...]

    def of_stream(self, stream: str, charging: Collection[str] | None = None) -> tuple[LedgerRow, ...]:
        """A stream's rows with their charges, oldest first; if asked, only rows that charge some of these blocks."""
        wanted = np.array([charging is None or row.block_id in charging for row in self.blocks], bool)
        hits = np.concatenate([[0], np.cumsum(wanted[self.block])])
        return tuple(
            replace(row, charges=self._charges(at)) if self.first[at] < self.first[at + 1] else row
            for at, row in enumerate(self.rows)
            if row.stream == stream and (charging is None or hits[self.first[at]] < hits[self.first[at + 1]])
        )

    def _charges(self, at: int) -> tuple[Charge, ...]:
        part = slice(self.first[at], self.first[at + 1])
        pairs = zip(self.block[part].tolist(), self.mechanism[part].tolist(), strict=True)
        return tuple(Charge(self.blocks[block].block_id, *self.mechanisms[mechanism]) for block, mechanism in pairs)

    def released(self) -> set[tuple[str, int]]:
        """Attempts that were cancelled."""
        return {(row.round_id, row.attempt) for row in self.rows if row.state == "cancelled"}


# -- hashes ------------------------------------------------------------------------------------------------------------


def hash_of(row: BlockRow | LedgerRow) -> str:
    """SHA-256 over the canonical JSON of everything in the row but its hash.

    Raises:
        PrivacyError: a field is no text or whole number where it must be one.
    """
    try:
        if isinstance(row, BlockRow):
            return _sha256(_block_body(row))
        charges = (_head_text(charge.block_id) + _mechanism_text(charge.mechanism) for charge in row.charges)
        return _sha256(_row_body(row, ",".join(charges)))
    except TypeError as error:
        raise PrivacyError(f"value cannot be encoded as canonical JSON: {error}") from None


def _block_body(row: BlockRow) -> str:
    text = _text
    return (
        f'{{"block_id":{text(row.block_id)},"policy":{text(row.policy)},"prev_hash":{text(row.prev_hash)},'
        f'"seq":{_whole(row.seq)},"stream":{text(row.stream)}}}'
    )


def _row_body(row: LedgerRow, charges: str) -> str:
    text = _text
    account = "" if row.account == TRAIN else f'"account":{text(row.account)},'
    window = "" if row.window == 0 else f',"window":{_whole(row.window)}'
    return (
        f'{{{account}"adapter_sha256":{text(row.adapter_sha256)},"at":{text(row.at)},"attempt":{_whole(row.attempt)},'
        f'"blocks_head":{text(row.blocks_head)},"charges":[{charges}],"noise_source":{text(row.noise_source)},'
        f'"plan_hash":{text(row.plan_hash)},"prev_hash":{text(row.prev_hash)},"round_id":{text(row.round_id)},'
        f'"seq":{_whole(row.seq)},"state":{text(row.state)},"stream":{text(row.stream)}{window}}}'
    )


def _sha256(body: str) -> str:
    try:
        return hashlib.sha256(body.encode("utf-8")).hexdigest()
    except UnicodeEncodeError as error:
        raise PrivacyError(f"value cannot be encoded as canonical JSON: {error}") from None


# Of anything but text it makes a TypeError.
_text = encode_basestring


def _whole(value: object) -> str:
    if type(value) is not int or abs(value) > _WHOLE_MAX:
        raise PrivacyError(f"value={value!r}: must be a whole number within 2^53")
    return str(value)


@lru_cache(maxsize=100_000)
def _mechanism_text(mechanism: Mechanism) -> str:
    q, sigma, steps = mechanism
    return f',"q":{_number(q)},"sigma":{_number(sigma)},"steps":{_whole(steps)}}}'


@lru_cache(maxsize=100_000)
def _number(value: float) -> str:
    return canonical(value).decode("ascii")


# -- the chains --------------------------------------------------------------------------------------------------------


def verify(blocks: Sequence[BlockRow], rows: Sequence[LedgerRow]) -> None:
    """Recompute both chains.

    Raises:
        LedgerBroken: names the first row that does not match.
    """
    known = _follow(blocks, "block", (_computed(row) for row in blocks))
    _follow(rows, "ledger", (_computed(row) for row in rows))
    names = {block.block_id: seq for seq, block in enumerate(blocks, start=1)}
    for row in rows:
        newest = max((names.get(charge.block_id, len(blocks) + 1) for charge in row.charges), default=0)
        _check_known(row, newest, known)


def _computed(row: BlockRow | LedgerRow) -> str:
    try:
        return hash_of(row)
    except PrivacyError:
        return "none"


def _follow(rows: Sequence[BlockRow | LedgerRow], kind: str, computed: Iterable[str]) -> dict[str, int]:
    """Position of each hash in a chain that holds."""
    before, seen = GENESIS, {GENESIS: 0}
    for expected, (row, found) in enumerate(zip(rows, computed, strict=True), start=1):
        if row.seq != expected:
            raise LedgerBroken(f"{kind} row {expected}: is missing, the next one is {row.seq}")
        if row.prev_hash != before or found != row.hash:
            name = f"{row.round_id}, {row.state}" if isinstance(row, LedgerRow) else row.block_id
            raise LedgerBroken(
                f"{kind} row {row.seq} ({name}): its hash does not match, it was changed; restore the newest backup"
            )
        before = row.hash
        seen[before] = expected
    return seen


def _check_known(row: LedgerRow, newest: int, known: Mapping[str, int]) -> None:
    """The row's blocks, the newest of which is given, must have been known at its time."""
    if newest > known.get(row.blocks_head, -1):
        raise LedgerBroken(
            f"ledger row {row.seq} ({row.round_id}, {row.state}): charges blocks that were not known at its time"
        )


# -- reading -----------------------------------------------------------------------------------------------------------

_BLOCK_COLUMNS = [tables.blocks.c[name] for name in BlockRow.__dataclass_fields__]
_ROW_FIELDS = [name for name in LedgerRow.__dataclass_fields__ if name != "charges"]


def read_blocks(db: sa.Connection) -> list[BlockRow]:
    """All blocks, oldest first."""
    return [BlockRow(*row) for row in db.execute(sa.select(*_BLOCK_COLUMNS).order_by(tables.blocks.c.seq)).all()]


def read_rows(db: sa.Connection, where: sa.ColumnElement[bool] | None = None) -> list[LedgerRow]:
    """The steps that match, or all, oldest first.

    Raises:
        LedgerBroken: a charge that nobody could have written.
    """
    steps = list(_rows(db, where))
    if where is not None and not steps:
        return []
    mechanisms = _mechanisms(db, where)
    packed = list(_charges(db, where))
    names = _names(db, [blocks for _, blocks, _ in packed])
    charged: dict[int, tuple[Charge, ...]] = {}
    for seq, blocks, numbers in packed:
        own = mechanisms.pop(seq, {})
        _check_numbers(seq, numbers.tolist(), own)
        try:
            together = zip(blocks.tolist(), numbers.tolist(), strict=True)
            pairs = [(names[block], own[number]) for block, number in together]
        except KeyError:
            raise LedgerBroken(f"ledger row {seq}: charges blocks that were not known at its time") from None
        charged[seq] = tuple(Charge(name, *mechanism) for name, mechanism in pairs)
    rows = [_row(found, charged.pop(found.seq, ())) for found in steps]
    if lost := charged.keys() | mechanisms.keys():
        raise LedgerBroken(f"ledger row {min(lost)}: is missing, though its charges are there")
    return rows


def read_history(db: sa.Connection) -> History:
    """The whole ledger, with both chains verified.

    Raises:
        LedgerBroken: names the first row that does not match.
    """
    with without_collection():
        blocks = read_blocks(db)
        known = _follow(blocks, "block", (_computed(row) for row in blocks))
        rows = [_row(found, ()) for found in _rows(db, None)]
        columns = _Columns(db, blocks, known)
        _follow(rows, "ledger", columns.hashes(rows))
        return columns.history(blocks, rows)


@contextmanager
def without_collection() -> Iterator[None]:
    """No search for cycles while hundreds of thousands of values are made that have none: a quarter of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class _Columns:
    """Reads charges row by row beside the rounds' chain, and keeps them as columns."""

    def __init__(self, db: sa.Connection, blocks: Sequence[BlockRow], known: Mapping[str, int]) -> None:
        self._charges = _charges(db, None)
        self._own = _mechanisms(db, None)
        self._known = known
        # (B,) the beginnings of charges as bytes side by side: a row names blocks of all ages, and the processor need
        # not look far for them. The zeros that fill up the shorter ones are dropped again; JSON has none.
        self._heads = np.array([_head_text(row.block_id).encode("utf-8") for row in blocks] or [b""])
        self._numbers: dict[Mechanism, int] = {}
        self._block: list[Indices] = []
        self._mechanism: list[Indices] = []
        self._first = [0]

    def hashes(self, rows: Sequence[LedgerRow]) -> Iterator[str]:
        """The hash of each row as it should be."""
        waiting = next(self._charges, None)
        for row in rows:
            text = ""
            if waiting is not None and waiting[0] < row.seq:
                break
            _check_known(row, 0, self._known)
            if waiting is not None and waiting[0] == row.seq:
                text = self._take(row, *waiting[1:])
                waiting = next(self._charges, None)
            self._first.append(self._first[-1] + (len(self._block[-1]) if text else 0))
            try:
                yield _sha256(_row_body(row, text))
            except (PrivacyError, TypeError):
                yield "none"
        if waiting is not None or self._own:
            lost = min([*self._own, *([waiting[0]] if waiting else [])])
            raise LedgerBroken(f"ledger row {lost}: is missing, though its charges are there")

    def _take(self, row: LedgerRow, blocks: Indices, numbers: Indices) -> str:
        """Keep one row's charges; returns their canonical JSON."""
        own = self._own.pop(row.seq, {})
        if blocks.min() < 1:
            raise LedgerBroken(f"ledger row {row.seq}: a charge was changed (blocks {blocks[:9].tolist()})")
        _check_known(row, int(blocks.max()), self._known)
        # Stretches of one mechanism: a row has few mechanisms, and mostly one stretch of each.
        starts = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist()]
        runs = list(zip(numbers[starts].tolist(), starts, [*starts[1:], len(numbers)], strict=True))
        _check_numbers(row.seq, [number for number, _, _ in runs], own)
        kinds = [self._numbers.setdefault(own[number], len(self._numbers)) for number, _, _ in runs]
        self._block.append(blocks - 1)
        self._mechanism.append(np.repeat(np.array(kinds), [last - first for _, first, last in runs]))
        heads: list[bytes] = self._heads[self._block[-1]].tolist()
        tails = [(_mechanism_text(own[number]).encode("ascii"), first, last) for number, first, last in runs]
        return b",".join((tail + b",").join(heads[first:last]) + tail for tail, first, last in tails).decode("utf-8")

    def history(self, blocks: Sequence[BlockRow], rows: Sequence[LedgerRow]) -> History:
        """What was read, once `hashes` is at its end."""
        none: Indices = np.zeros(0, np.int64)
        return History(
            blocks=tuple(blocks),
            rows=tuple(rows),
            first=np.array(self._first, np.int64),
            block=np.concatenate([none, *self._block]),
            mechanism=np.concatenate([none, *self._mechanism]),
            mechanisms=tuple(self._numbers),
        )


def _head_text(block_id: str) -> str:
    """A charge as canonical JSON, up to its mechanism."""
    return f'{{"block_id":{_text(block_id)}'


def _rows(db: sa.Connection, where: sa.ColumnElement[bool] | None) -> Iterable[Any]:
    query = sa.select(*(tables.ledger.c[name] for name in _ROW_FIELDS)).order_by(tables.ledger.c.seq)
    return db.execute(query if where is None else query.where(where))


def _row(found: Any, charges: tuple[Charge, ...]) -> LedgerRow:
    values: tuple[Any, ...] = (*found[:_CHARGES_AT], charges, *found[_CHARGES_AT:])
    return LedgerRow(*values)


_CHARGES_AT = list(LedgerRow.__dataclass_fields__).index("charges")


def _charges(db: sa.Connection, where: sa.ColumnElement[bool] | None) -> Iterator[tuple[int, Indices, Indices]]:
    try:
        yield from tables.charges_by_row(db, where)
    except ValueError as error:
        raise LedgerBroken(str(error)) from None


def _names(db: sa.Connection, blocks: Sequence[Indices]) -> dict[int, str]:
    """Ids of blocks by their number."""
    if not blocks:
        return {}
    asked = tables.among(db, tables.blocks.c.seq, np.unique(np.concatenate(blocks)))
    query = sa.select(tables.blocks.c.seq, tables.blocks.c.block_id).where(asked)
    return {row.seq: row.block_id for row in db.execute(query)}


def _mechanisms(db: sa.Connection, where: sa.ColumnElement[bool] | None) -> dict[int, dict[int, Mechanism]]:
    """Per row its mechanisms by number."""
    query = sa.select(tables.mechanisms)
    if where is not None:
        query = query.where(tables.mechanisms.c.seq.in_(sa.select(tables.ledger.c.seq).where(where)))
    found: dict[int, dict[int, Mechanism]] = {}
    for seq, number, q, sigma, steps in db.execute(query):
        try:
            accounting.check_mechanism(q, sigma, steps)
        except PrivacyError as error:
            raise LedgerBroken(f"ledger row {seq}: a charge was changed ({error})") from None
        found.setdefault(seq, {})[number] = (float(q), float(sigma), steps)
    return found


def _check_numbers(seq: int, numbers: Sequence[int], own: Mapping[int, Mechanism]) -> None:
    if set(numbers) != own.keys():
        raise LedgerBroken(f"ledger row {seq}: a charge was changed (mechanisms {sorted(own)} are there)")
