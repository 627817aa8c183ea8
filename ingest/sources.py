"""Files to produce from: JSONL, CSV and Parquet, row by row, never whole in memory. pyarrow stays in `ingest.parquet`.

What is wrong in a row is not judged here: a value of the wrong type stays what it is, and the topic's validation says
why it is none. Only a file that cannot be read at all is an error.

Of CSV and Parquet an empty cell or a null is an absent field, and a column `attributes.NAME` is the attribute NAME.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, cast

from ingest.errors import SettingError, SourceError
from ingest.record import Record

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

Form = Literal["jsonl", "csv", "parquet"]
FORMS: Final[tuple[Form, ...]] = ("jsonl", "csv", "parquet")

_SUFFIXES: Final[Mapping[str, Form]] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
_AVRO: Final = (
    "is Avro, which Tidegate does not read: its schema lives with its writer; "
    "convert it upstream, `java -jar avro-tools.jar tojson FILE.avro > FILE.jsonl`, and produce the JSONL"
)
_PROTOBUF: Final = (
    "is Protobuf, which Tidegate does not read: it means nothing without its .proto; "
    "let the producer write JSON (MessageToJson with preserving_proto_field_name), a line a message"
)
_REFUSED: Final[Mapping[str, str]] = {
    ".avro": _AVRO,
    ".proto": _PROTOBUF,
    ".pb": _PROTOBUF,
    ".bin": _PROTOBUF,
    "avro": _AVRO,
    "proto": _PROTOBUF,
    "protobuf": _PROTOBUF,
}
_GZIP_MAGIC: Final = b"\x1f\x8b"
# What a file begins with whose name says otherwise.
_MAGICS: Final = ((b"Obj\x01", _AVRO), (b"PAR1", "is Parquet; name it .parquet, or give --format parquet"))
# The csv module's own bound of 128 KiB is below what a topic takes; a cell beyond this is no record's.
_CELL_CHARS_MAX: Final = 64 << 20
_ATTRIBUTE: Final = "attributes."
_INTEGER: Final = re.compile(r"-?\d{1,9}")
_FIELDS: Final = frozenset(Record.model_fields)


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row. `raw` is a line of JSONL as it stands; else `fields` are the row's, by the contract's names.

    `number` counts rows (lines of JSONL) from 1 and is what a resumed run starts behind; `where` is for people.
    """

    number: int
    where: str
    raw: bytes | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


def form_of(path: Path, given: str | None = None) -> Form:
    """How a file is to be read: as `given`, else by its name without `.gz`; what has no known name is JSONL.

    Raises:
        SourceError: the format is one that is refused; the message says what to do instead.
        SettingError: `given` is no format.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = next(iter(suffixes[-2:-1] if packed else suffixes[-1:]), "")
    name = suffix if given is None else given.lower()
    if name in _REFUSED:
        raise SourceError(f"file={path}: {_REFUSED[name]}")
    if given is not None and name not in FORMS:
        raise SettingError(f"format={given}: must be one of {', '.join(FORMS)}")
    form = cast("Form", name) if given is not None else _SUFFIXES.get(name, "jsonl")
    if packed and form == "parquet":
        raise SourceError(f"file={path}: gzip around Parquet; run gunzip first (Parquet is compressed inside)")
    return form


@contextmanager
def _readable(path: Path, at: list[int]) -> Iterator[None]:
    """Errors of the operating system, of gzip and of csv as one line; `at[0]` is the line being read."""
    try:
        yield
    except FileNotFoundError:
        raise SourceError(f"file={path}: no such file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        why = " ".join(str(error).split()).lower()
        raise SourceError(f"file={path}: line {at[0]}: gzip is cut off or broken ({why}); copy it again") from None
    except csv.Error as error:
        raise SourceError(
            f"file={path}: line {at[0]}: no CSV ({error}); close the quotes, or name the delimiter by --delimiter"
        ) from None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise SourceError(f"file={path}: {why}; must be a file of {', '.join(FORMS)}") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if they are gzip's."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield cast("BinaryIO", unpacked)


@dataclass(frozen=True)
class Source:
    """One file with how it is read; made by :func:`open_source`. `field_map` has renamed its columns already.

    Of JSONL it has not: a line is renamed only if it is an object, see `ingest.produce`.
    """

    path: Path
    form: Form
    field_map: Mapping[str, str]
    delimiter: str

    def count(self) -> int:
        """Rows to send; reads the whole file once (of Parquet only the footer), so that it is known to be readable.

        Raises:
            SourceError: it is not.
        """
        if self.form == "parquet":
            from ingest.parquet import ParquetSource

            with ParquetSource(self.path) as parquet:
                self._names(parquet.columns)
                return parquet.rows
        return sum(1 for _ in self.rows())

    def rows(self, after: int = 0) -> Generator[SourceRow]:
        """Rows behind number `after`, in order. Close it if it is not read to its end.

        Raises:
            SourceError: the file cannot be read on; the rows before were given.
        """
        reading = {"jsonl": self._lines, "csv": self._cells, "parquet": self._columns}[self.form]
        with closing(reading(after)) as rows:
            yield from rows

    def _lines(self, after: int) -> Generator[SourceRow]:
        """Lines that hold anything."""
        at = [1]
        with _readable(self.path, at), _opened(self.path) as file:
            for number, line in enumerate(file, start=1):
                at[0] = number
                if number == 1:
                    self._check_magic(line)
                if number > after and (raw := line.rstrip(b"\r\n")):
                    yield SourceRow(number, f"{self.path}:{number}", raw)

    def _check_magic(self, start: bytes) -> None:
        for magic, what in _MAGICS:
            if start.startswith(magic):
                raise SourceError(f"file={self.path}: {what}")

    def _cells(self, after: int) -> Generator[SourceRow]:
        at = [1]
        csv.field_size_limit(_CELL_CHARS_MAX)
        with _readable(self.path, at), _opened(self.path) as file:
            self._check_encoding(file)
            # A byte that is not UTF-8 becomes a lone surrogate: the row is sent, and rejected for it.
            with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
                reader = csv.reader(text, delimiter=self.delimiter, strict=True)
                names = self._names([name.strip() for name in next(reader, [])])
                at[0] = reader.line_num + 1
                for number, cells in enumerate(reader, start=1):
                    where = f"{self.path}:{at[0]}"
                    at[0] = reader.line_num + 1
                    if number > after and cells:
                        yield SourceRow(number, where, fields=_row(names, _typed(names, cells)))

    def _check_encoding(self, file: BinaryIO) -> None:
        start = file.read(4)
        file.seek(0)
        if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise SourceError(f"file={self.path}: is UTF-16; save it as CSV UTF-8")
        self._check_magic(start)

    def _columns(self, after: int) -> Generator[SourceRow]:
        from ingest.parquet import ParquetSource

        with ParquetSource(self.path) as parquet, closing(parquet.values(after)) as rows:
            names = self._names(parquet.columns)
            for number, values in enumerate(rows, start=after + 1):
                yield SourceRow(number, f"{self.path}: row {number}", fields=_row(names, values))

    def _names(self, columns: Sequence[str]) -> list[str]:
        """The contract's names of the columns.

        Raises:
            SourceError: two columns are one field, or there is no field of the contract among them.
        """
        names = [self.field_map.get(column, column) for column in columns]
        twice = {name for name in names if name and names.count(name) > 1}
        if "attributes" in names and any(name.startswith(_ATTRIBUTE) for name in names):
            twice.add("attributes")
        if twice:
            raise SourceError(f"file={self.path}: two columns become {min(twice)}; rename one, or mend the field map")
        if not any(name in _FIELDS or name.startswith(_ATTRIBUTE) for name in names):
            shown = ", ".join(columns)[:80] or "nothing"
            raise SourceError(
                f"file={self.path}: row 1 must name the columns and names no field of the contract ({shown}); "
                "add a header row, map columns by --field SOURCE=FIELD, or name the delimiter by --delimiter"
            )
        return names


def _typed(names: Sequence[str], cells: list[str]) -> list[Any]:
    """Cells of CSV as values: an empty one is none, and `schema_version` is a number if it looks like one."""
    values: list[Any] = [cell or None for cell in cells]
    for place, (name, cell) in enumerate(zip(names, cells, strict=False)):
        if name == "schema_version" and _INTEGER.fullmatch(cell):
            values[place] = int(cell)
    return values


def _row(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Fields of one row. A cell beyond the header gets a name no contract has, so that it is rejected, not lost."""
    fields: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    for place, value in enumerate(values):
        if value is None:
            continue
        name = names[place] if place < len(names) else ""
        if name.startswith(_ATTRIBUTE):
            attributes[name.removeprefix(_ATTRIBUTE)] = _plain(value)
        elif name == "attributes":
            fields[name] = _object(value)
        else:
            fields[name or f"column {place + 1}"] = _plain(value)
    if attributes:
        fields["attributes"] = attributes
    return fields


def _object(value: Any) -> Any:
    """A struct, or a map as pyarrow gives it (pairs), as an object without nulls; one with a key twice stays pairs."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) and isinstance(p[0], str) for p in pairs):
        return _plain(value)
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        return _plain(pairs)
    return {key: _plain(item) for key, item in pairs if item is not None}


def _plain(value: Any) -> Any:
    """A value as JSON can say it: times in RFC 3339, bytes as UTF-8, what JSON has no form for as text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def open_source(
    path: Path, form: str | None = None, field_map: Mapping[str, str] | None = None, delimiter: str | None = None
) -> Source:
    """A file with how it is read; nothing is read yet. The delimiter of CSV is a comma, of `.tsv` a tab.

    Raises:
        SourceError: the format is refused.
        SettingError: no such format, or a delimiter that is not one character.
    """
    known = form_of(path, form)
    usual = "\t" if ".tsv" in (suffix.lower() for suffix in path.suffixes) else ","
    chosen = usual if delimiter is None else {"\\t": "\t", "tab": "\t"}.get(delimiter, delimiter)
    if len(chosen) != 1 or chosen in '\r\n"':
        raise SettingError(f"delimiter={chosen!r}: must be one character, such as ; or tab")
    return Source(path, known, dict(field_map or {}), chosen)
