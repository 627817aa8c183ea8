"""Does a block look like the blocks before it? An alarm for an operator, never a reason to drop a record.

Four mixes (labels, domains, lengths of prompts and of completions in classes) and the share of words not seen lately
are compared with an exponentially forgetting summary of earlier blocks. Work is bounded by the block and the summary
by constants, however long the history.

A mix is tested by Pearson's two-sample chi-square (K. Pearson 1900), with two corrections that keep false alarms rare:
its null distribution is matched in mean and variance (Satterthwaite 1946), because rare classes widen it, and the
statistic is divided by the dispersion that the stream's own blocks have shown (McCullagh and Nelder, Generalized Linear
Models, 1989, section 4.5), because records of one person come together and no two hours are alike.
The share of new words is tested by Welch's z over records, divided likewise. An alarm also needs an effect that is
worth a look: with many records everything is significant.

A reference that raised an alarm begins anew with the block that raised it: one alarm a change, not one a block.
What is kept holds labels, domains, counts and hashes of words: it stays in the lane's folder, mode 0600.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import os
import re
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from ingest.record import Record

# Below it a share is too coarse to speak of: smaller blocks are put together until there are so many records.
_RECORDS_MIN: Final = 200
# Blocks (or heaps of small ones) seen before the first alarm: one to compare with, two to learn the dispersion from.
_WARM_UP: Final = 3
# Five tests a block: one false alarm in some 2,000 blocks, where dispersion is as learnt.
_P_MAX: Final = 1e-4
# What a block's weight falls to with each later block: half after seven blocks, a hundredth after 44.
_KEEP: Final = 0.9
# Cohen's w of a "small" effect (Statistical Power Analysis, 1988, chapter 7), squared.
_EFFECT_MIN: Final = 0.1**2
# New words: two of a hundred more than usual; less is a new product's name or a season.
_NEW_WORDS_MIN: Final = 0.02
# The usual share of new words falls while a vocabulary fills; it is forgotten faster (half in two blocks) to keep up.
_LEVEL_HASTE: Final = 4
# Classes of a mix with fewer expected records in the block share one class; the widened null allows so few.
_EXPECTED_MIN: Final = 1.0
# Classes kept of a mix; declared labels are far fewer, and undeclared ones must not fill the disk.
_CLASSES_MAX: Final = 256
# A known dispersion grows at most so much a block: a real drift is not learnt as noise at once.
_SURPRISE_MAX: Final = 2.0
# 64 KiB of ages: 20,000 different words fill a quarter, so that a quarter of truly new words goes unnoticed.
_SLOTS: Final = 1 << 16
# A word not seen for so many blocks is new again; keeps the slots from filling up for good.
_AGE_MAX: Final = 32
# Texts read for words, evenly over the block: their noise is below a hundredth, and reading is what costs time.
_TEXTS_MAX: Final = 2000
# Classes of length grow by a half: 21 of them reach 2,000 characters.
_LENGTH_STEP: Final = 1.5
# Letters of a word; digits are left out, as order numbers are always new. Where a script writes no spaces
# (CJK, kana, hangul, Thai), each character counts as a word.
_WORD: Final = re.compile(r"[\u0e00-\u0eff\u2e80-\u9fff\uac00-\ud7af]|[^\W\d_]+")
_REST: Final = ""

_LABEL, _DOMAIN, _PROMPT, _COMPLETION = "label", "domain", "prompt length", "completion length"
_CLASSES_OF: Final = (_LABEL, _DOMAIN, _PROMPT, _COMPLETION)
_NO_LABEL: Final = "no label"


class _Mix(BaseModel):
    """Decayed counts by class, and the dispersion blocks have shown (1: as chance alone would have it)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    counts: dict[str, float] = Field(default_factory=dict, max_length=_CLASSES_MAX + 1)
    dispersion: float = Field(default=1.0, ge=0)


class _Shares(BaseModel):
    """Records, and mean and sum of squared deviations of their shares of new words; decayed in the reference."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    n: float = Field(default=0.0, ge=0)
    mean: float = Field(default=0.0, ge=0, le=1)
    squares: float = Field(default=0.0, ge=0)

    def add(self, other: _Shares, keep: float = 1.0) -> None:
        """Join two samples (Chan, Golub and LeVeque 1979), this one weighted by `keep`."""
        old = self.n * keep
        if (total := old + other.n) > 0:
            apart = other.mean - self.mean
            self.squares = self.squares * keep + other.squares + apart * apart * old * other.n / total
            self.mean = min(max(self.mean + apart * other.n / total, 0.0), 1.0)
            self.n = total

    @property
    def error_squared(self) -> float:
        """Squared standard error of the mean."""
        # One word in a hundred records as a floor: blocks without any new word have no variance, but are no proof.
        return max(self.squares / max(self.n - 1, 1), 1e-4) / max(self.n, 1)


class _State(BaseModel):
    """What is kept between blocks."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    last_block: str = ""
    tested: int = Field(default=0, ge=0)
    records: float = Field(default=0.0, ge=0)
    mixes: dict[str, _Mix] = Field(default_factory=lambda: {name: _Mix() for name in _CLASSES_OF})
    words: _Shares = _Shares()
    words_dispersion: float = Field(default=1.0, ge=0)
    ages: str = ""
    heap_first: str = ""
    heap_records: int = Field(default=0, ge=0)
    heap: dict[str, dict[str, float]] = Field(default_factory=dict)
    heap_words: _Shares = _Shares()


class DriftWatch:
    """Compares each block of a lane with the blocks before it. One writer; a torn or foreign file is begun anew."""

    def __init__(self, path: Path, *, labels: Collection[str] | None = None) -> None:
        """Keep the summary at `path`. Labels outside `labels` (the declared ones) are not named in alarms."""
        self.path = path
        self._labels = frozenset(labels or ())
        self._state, self._ages = _load(path)

    def observe(self, block_id: str, records: Sequence[Record]) -> list[str]:
        """What changed with this block, a sentence each; none for the first blocks, small ones, or one seen last.

        Blocks of fewer than 200 records are put together until there are so many. The summary is on disk when this
        returns. Sentences hold shares and lengths and declared names, no content of records.

        Raises:
            OSError: the summary cannot be written; what was observed still counts until the process ends.
        """
        state = self._state
        if not records or state.last_block == block_id:
            return []
        state.last_block = block_id
        state.heap_first = state.heap_first or block_id
        state.heap_records += len(records)
        for name, counts in _counted(records).items():
            state.heap[name] = _bounded(_sum(state.heap.get(name, {}), counts))
        state.heap_words.add(self._new_words(records))
        said: list[str] = []
        if state.heap_records >= _RECORDS_MIN:
            said = self._compare(block_id)
        self._save()
        return said

    def _compare(self, block_id: str) -> list[str]:
        """Test the heap against the reference, then join them."""
        state = self._state
        warm = state.tested >= _WARM_UP
        # A block of a tenth of what is remembered, or larger, ages it by one step; a smaller one by less, so that
        # a quiet night does not wipe out the day.
        keep = _KEEP ** min(1.0, state.heap_records / max(state.records * (1 - _KEEP), 1.0))
        found = []
        for name, mix in state.mixes.items():
            heap = state.heap.get(name, {})
            if sentence := self._test_mix(name, mix, heap, warm=warm):
                found.append(sentence)
                mix.counts = dict(heap)
            else:
                mix.counts = _bounded(_sum(heap, mix.counts, keep))
        if sentence := self._test_words(warm=warm):
            found.append(sentence)
            state.words = state.heap_words
        elif state.tested:
            # All words of the first block are new: that is no level to compare with.
            state.words.add(state.heap_words, keep**_LEVEL_HASTE)
        self._ages = self._ages.translate(_OLDER)
        first = state.heap_first
        where = f"block {block_id}" if first == block_id else f"blocks {first} to {block_id}"
        state.records = state.records * keep + state.heap_records
        state.tested += 1
        state.heap_first, state.heap_records, state.heap, state.heap_words = "", 0, {}, _Shares()
        return [f"{where}: {sentence}" for sentence in found]

    def _test_mix(self, name: str, mix: _Mix, heap: Mapping[str, float], *, warm: bool) -> str:
        statistic, df, variance = _chi_square(heap, mix.counts)
        if df < 1:
            return ""
        spread = max(mix.dispersion, 1.0)
        n = sum(heap.values())
        drifted = (
            warm
            and (statistic - df * spread) / n >= _EFFECT_MIN
            and _chi_square_tail(statistic / spread, df, variance) <= _P_MAX
        )
        mix.dispersion = _learnt(mix.dispersion, statistic / df, self._state.tested, warm=warm)
        return self._say_mix(name, heap, mix.counts) if drifted else ""

    def _test_words(self, *, warm: bool) -> str:
        state, now = self._state, self._state.heap_words
        before = state.words
        if before.n < 1 or now.n < 1:
            return ""
        z = (now.mean - before.mean) / math.sqrt(now.error_squared + before.error_squared)
        more = now.mean - before.mean
        drifted = (
            warm
            and more >= _NEW_WORDS_MIN
            and math.erfc(z / math.sqrt(2 * max(state.words_dispersion, 1.0))) / 2 <= _P_MAX
        )
        # At first, fewer new words than before is how a vocabulary fills: a trend, no dispersion.
        shown = z * z if warm else max(z, 0.0) ** 2
        state.words_dispersion = _learnt(state.words_dispersion, shown, state.tested, warm=warm)
        if not drifted:
            return ""
        return f"words not seen lately: {_percent(now.mean)} of a prompt's words, usually {_percent(before.mean)}"

    def _new_words(self, records: Sequence[Record]) -> _Shares:
        """Shares of words of each text that are not known yet, and then know them."""
        shares = []
        seen: set[int] = set()
        for record in records[:: -(-len(records) // _TEXTS_MAX)]:
            slots = {zlib.crc32(word.encode()) % _SLOTS for word in _WORD.findall(record.prompt.lower())}
            if slots:
                shares.append(sum(not self._ages[slot] for slot in slots) / len(slots))
                seen |= slots
        ages = bytearray(self._ages)
        for slot in seen:
            ages[slot] = _AGE_MAX
        self._ages = bytes(ages)
        n = len(shares)
        mean = sum(shares) / n if n else 0.0
        return _Shares(n=n, mean=mean, squares=sum((share - mean) ** 2 for share in shares))

    def _say_mix(self, name: str, now: Mapping[str, float], before: Mapping[str, float]) -> str:
        if name in {_PROMPT, _COMPLETION}:
            return f"{name}: typically {_typical(now):.0f} characters, usually {_typical(before):.0f}"
        n, m = sum(now.values()), sum(before.values())
        changes = {key: now.get(key, 0.0) / n - before.get(key, 0.0) / m for key in now.keys() | before.keys()}
        most = sorted(changes, key=lambda key: -abs(changes[key]))[:3]
        parts = [
            f"{self._name(name, key)} {_percent(now.get(key, 0.0) / n)} (usually {_percent(before.get(key, 0.0) / m)})"
            for key in most
        ]
        return f"mix of {name}s: {', '.join(parts)}"

    def _name(self, mix: str, key: str) -> str:
        """Domains are declared in every stream; a label only if it is among those given."""
        return key if mix == _DOMAIN or key in self._labels or key == _NO_LABEL else f"an undeclared {mix}"

    def _save(self) -> None:
        self._state.ages = base64.b64encode(zlib.compress(self._ages, 6)).decode()
        fresh = self.path.with_name(f".{self.path.name}.new")
        with contextlib.suppress(FileNotFoundError):
            fresh.unlink()
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._state.model_dump_json())
        # Not synced: after a power cut the summary is begun anew, which costs a few blocks without alarms.
        fresh.replace(self.path)


_OLDER: Final = bytes(max(age - 1, 0) for age in range(256))


def _load(path: Path) -> tuple[_State, bytes]:
    try:
        state = _State.model_validate_json(path.read_bytes())
        ages = zlib.decompressobj().decompress(base64.b64decode(state.ages, validate=True), _SLOTS)
    except (OSError, ValidationError, binascii.Error, zlib.error):
        return _State(), bytes(_SLOTS)
    if len(ages) != _SLOTS or set(state.mixes) != set(_CLASSES_OF):
        return _State(), bytes(_SLOTS)
    return state, ages


def _counted(records: Iterable[Record]) -> dict[str, Counter[str]]:
    rows = [(r.label, r.domain, len(r.prompt), len(r.completion)) for r in records]
    labels, domains, prompts, completions = zip(*rows, strict=True)
    return {
        _LABEL: Counter(_NO_LABEL if label is None else label for label in labels),
        _DOMAIN: Counter(domains),
        _PROMPT: _lengths(prompts),
        _COMPLETION: _lengths(completions),
    }


def _lengths(chars: Iterable[int]) -> Counter[str]:
    classes: Counter[str] = Counter()
    for length, count in Counter(chars).items():
        classes[str(int(math.log(max(length, 1), _LENGTH_STEP)))] += count
    return classes


def _typical(classes: Mapping[str, float]) -> float:
    """Geometric mean of lengths, from the middles of their classes."""
    total = sum(classes.values())
    mean = sum(count * (int(name) + 0.5) for name, count in classes.items() if name != _REST) / total
    return float(_LENGTH_STEP**mean)


def _sum(a: Mapping[str, float], b: Mapping[str, float], weight: float = 1.0) -> dict[str, float]:
    return {key: a.get(key, 0.0) + weight * b.get(key, 0.0) for key in a.keys() | b.keys()}


def _bounded(counts: dict[str, float]) -> dict[str, float]:
    """The largest classes; the others in one without a name."""
    if len(counts) <= _CLASSES_MAX:
        return counts
    ordered = sorted((key for key in counts if key != _REST), key=lambda key: -counts[key])
    kept = {key: counts[key] for key in ordered[:_CLASSES_MAX]}
    return {**kept, _REST: sum(counts.values()) - sum(kept.values())}


def _chi_square(now: Mapping[str, float], before: Mapping[str, float]) -> tuple[float, int, float]:
    """Pearson's statistic of two samples of a mix, its mean and its variance if both come from one mix.

    Decayed counts vary less than counts of the same size: the statistic is then smaller than its mean says.
    """
    n, m = sum(now.values()), sum(before.values())
    if n <= 0 or m <= 0:
        return 0.0, 0, 0.0
    share = n / (n + m)
    pairs: list[tuple[float, float]] = []
    rest_now = rest_both = 0.0
    for key in now.keys() | before.keys():
        here, both = now.get(key, 0.0), now.get(key, 0.0) + before.get(key, 0.0)
        if both * share < _EXPECTED_MIN:
            rest_now, rest_both = rest_now + here, rest_both + both
        else:
            pairs.append((here, both))
    if rest_both * share >= _EXPECTED_MIN:
        pairs.append((rest_now, rest_both))
    statistic = sum((here - both * share) ** 2 / (both * share * (1 - share)) for here, both in pairs)
    df = len(pairs) - 1
    return statistic, df, 2 * df + sum(1 / (both * share) for _, both in pairs)


def _chi_square_tail(statistic: float, df: int, variance: float) -> float:
    """Probability of so large a value, for a chi-square stretched to this mean and variance (Satterthwaite)."""
    from scipy.special import chdtrc

    stretch = variance / (2 * df)
    return float(chdtrc(df / stretch, statistic / stretch))


def _learnt(known: float, shown: float, tested: int, *, warm: bool) -> float:
    """Dispersion after one more block: a plain mean while warming up, then a slow and bounded one."""
    if not warm:
        # The first comparison is that of the second block.
        return shown if tested <= 1 else known + (shown - known) / tested
    return _KEEP * known + (1 - _KEEP) * min(shown, _SURPRISE_MAX * max(known, 1.0))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 1 else "100 %"
