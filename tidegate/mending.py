"""Rejected records, mended and sent again: every value is judged by the stream's contract before it is sent.

Which letters were sent again is kept in `replays/STREAM.jsonl` of the workspace, a line each, appended when the broker
has acknowledged. It could be derived from the stream's topic, where such messages carry the letter's key, but only by
reading all of it, and only while the topic holds it. When the file is lost, letters are sent once more and dropped as
duplicates.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidegate.access import append_lines, now, who
from tidegate.blocks import Rejects, opened
from tidegate.errors import TidegateError, UnknownName

if TYPE_CHECKING:
    from ingest.deadletters import DeadLetter, Mended
    from ingest.record import RecordLimits
    from tidegate.wiring import Service

_ATTRIBUTE = "attributes."


@dataclass(frozen=True)
class Mend:
    """What is done to a record: fields renamed, then left out, then set; or another value by the letter's key."""

    renames: Mapping[str, str] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    sets: Mapping[str, str] = field(default_factory=dict)
    edits: Mapping[str, bytes] = field(default_factory=dict)

    def apply(self, key: str, value: bytes | None) -> bytes:
        """The mended value.

        Raises:
            TidegateError: it cannot be mended this way.
        """
        if key in self.edits:
            return self.edits[key]
        if value is None:
            raise TidegateError("a null message has nothing to mend; give a whole record by --edit")
        if not (self.renames or self.drops or self.sets):
            return value
        fields = self._renamed(_object(value))
        for name in self.drops:
            fields.pop(name, None)
        for name, text in self.sets.items():
            self._set(fields, name, text)
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "backslashreplace")

    def _renamed(self, fields: dict[str, Any]) -> dict[str, Any]:
        from ingest.errors import SourceError
        from ingest.produce import renamed

        if not self.renames.keys() & fields.keys():
            return fields
        try:
            return renamed("renaming", fields, self.renames)
        except SourceError as error:
            raise TidegateError(str(error)) from None

    @staticmethod
    def _set(fields: dict[str, Any], name: str, text: str) -> None:
        if name.startswith(_ATTRIBUTE):
            held = fields.get("attributes")
            fields["attributes"] = {**(held if isinstance(held, dict) else {}), name.removeprefix(_ATTRIBUTE): text}
        elif name == "schema_version" and re.fullmatch(r"\d{1,9}", text):
            fields[name] = int(text)
        else:
            fields[name] = text


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _object(value: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(value.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise TidegateError("not one JSON object with each key once; give a whole record by --edit")
    return fields


def as_value(value: bytes) -> Any:
    """A message as something to edit: the object it is, else its text."""
    try:
        return _object(value)
    except TidegateError:
        return value.decode("utf-8", "backslashreplace")


def read_edits(file: Path) -> dict[str, bytes]:
    """Mended records of a JSONL file: `{"key": ..., "value": ...}` a line, the value an object or a message's text.

    Raises:
        TidegateError: a line is something else, or a key stands twice.
    """
    edits: dict[str, bytes] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TidegateError(f"file={file}: {getattr(error, 'strerror', None) or 'not UTF-8'}; must be JSONL") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            key, value = given["key"], given["value"]
        except (ValueError, TypeError, KeyError, RecursionError):
            key = value = None
        if not isinstance(key, str) or not isinstance(value, dict | str):
            raise TidegateError(
                f'file={file}: line {number}: must be {{"key": "...", "value": {{...}}}}, '
                "as `tidegate dlq show STREAM KEY --content --json` prints it"
            )
        if key in edits:
            raise TidegateError(f"file={file}: line {number}: {key} stands twice; must stand once")
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        edits[key] = text.encode("utf-8", "surrogatepass")
    return edits


def replays_file(service: Service, stream: str) -> Path:
    """Where it is kept which letters were sent again."""
    return service.workspace.root / "replays" / f"{stream}.jsonl"


def replayed(service: Service, stream: str) -> dict[str, str]:
    """Letters that were sent again, each with when it last was. A line cut off by a crash does not count."""
    found: dict[str, str] = {}
    file = replays_file(service, stream)
    if file.exists():
        for line in file.read_bytes().splitlines():
            try:
                kept = json.loads(line)
                found[str(kept["key"])] = str(kept["at"])
            except (ValueError, TypeError, KeyError):
                continue
    return found


@dataclass
class Outcome:
    """What became of the chosen letters: keys, and for the refused ones every reason."""

    sent: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)
    before: list[str] = field(default_factory=list)


class Replay:
    """One replay of a stream's letters. :meth:`run` judges each and sends what passes."""

    def __init__(self, service: Service, stream: str, mend: Mend) -> None:
        self.service, self.stream, self.mend = service, stream, mend
        self.topic = service.stream(stream).topic
        self.outcome = Outcome()

    def run(self, keys: Sequence[str], code: str | None, *, dry: bool) -> Outcome:
        """Send the letters of these keys and of the edits, or all with a reason's code that were not sent before.

        Raises:
            UnknownName: a key is not on the dead-letter topic; nothing was sent.
            BrokerError: the broker refuses; what was acknowledged before is kept as such.
        """
        from ingest.broker import ensure_topic
        from ingest.deadletters import replay

        letters = self._chosen({*keys, *self.mend.edits}, code)
        settings = self.service.kafka()
        bytes_max = ensure_topic(settings, self.topic).message_bytes_max
        with ExitStack() as stack:
            mended = self._passing(letters, bytes_max, self._values(stack))
            if dry:
                self.outcome.sent += [one.letter for one in mended]
            else:
                replay(settings, self.topic, mended, self._acknowledged)
        return self.outcome

    def _chosen(self, keys: set[str], code: str | None) -> Iterable[DeadLetter]:
        from ingest.deadletters import each_dead_letter, find_dead_letters, topic_of

        if not keys:
            return self._with_reason(each_dead_letter(self.service.kafka(), self.topic), code)
        found = find_dead_letters(self.service.kafka(), self.topic, keys)
        if missing := sorted(keys - found.keys()):
            raise UnknownName(
                f"dead letter={missing[0]}: not on topic {topic_of(self.topic)}; "
                f"list them by `tidegate dlq list {self.stream}`"
            )
        return [letter for letter in found.values() if code is None or code in letter.codes]

    def _with_reason(self, letters: Iterable[DeadLetter], code: str | None) -> Iterator[DeadLetter]:
        before = replayed(self.service, self.stream)
        seen: set[str] = set()
        for letter in letters:
            if code in letter.codes and letter.key not in seen:
                seen.add(letter.key)
                if letter.key in before:
                    self.outcome.before.append(letter.key)
                else:
                    yield letter

    def _values(self, stack: ExitStack) -> Callable[[DeadLetter], bytes | None]:
        """Reads a letter's bytes; the data repository is opened when the first lies there."""
        rejects: list[Rejects] = []

        def value_of(letter: DeadLetter) -> bytes | None:
            if letter.reference is None:
                return letter.value
            if not rejects:
                rejects.append(Rejects(self.service, stack.enter_context(opened(self.service, self.stream))))
            return rejects[0].value(letter.reference, letter.source)

        return value_of

    def _passing(
        self, letters: Iterable[DeadLetter], bytes_max: int, value_of: Callable[[DeadLetter], bytes | None]
    ) -> Iterator[Mended]:
        from ingest.deadletters import OVERHEAD_BYTES_MAX, Mended

        limits = self.service.limits(self.stream)
        for letter in letters:
            try:
                value = self.mend.apply(letter.key, None if letter.key in self.mend.edits else value_of(letter))
            except TidegateError as error:
                self.outcome.refused[letter.key] = [str(error)]
                continue
            user, reasons = _judged(value, limits)
            if not reasons and len(value) > bytes_max - OVERHEAD_BYTES_MAX:
                reasons = [f"message: {len(value)} bytes; topic={self.topic} takes {bytes_max}"]
            if reasons:
                self.outcome.refused[letter.key] = reasons
            else:
                yield Mended(letter.key, user.encode(), value)

    def _acknowledged(self, keys: Sequence[str]) -> None:
        file = replays_file(self.service, self.stream)
        file.parent.mkdir(exist_ok=True)
        about = {"at": now(), "who": who()}
        append_lines(file, [{"key": key, **about} for key in keys])
        self.outcome.sent += keys


def _judged(value: bytes, limits: RecordLimits) -> tuple[str, list[str]]:
    """The record's user, or why the contract refuses it."""
    from ingest.record import Record, parse

    result = parse(value, limits)
    if isinstance(result, Record):
        return result.user_id, []
    return "", [str(reason) for reason in result]
