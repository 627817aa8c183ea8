"""Gate sets: declared, public, labelled records that candidates are judged on, one JSON object a line."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evaluation.errors import GateSetError

# With one label, every model is always right.
_LABELS_MIN = 2


class GateRecord(BaseModel):
    """One labelled record, in the form of the topic's; who sent it and when are read and not used."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    event_id: Annotated[str, Field(min_length=1)]
    domain: Annotated[str, Field(min_length=1)]
    prompt: Annotated[str, Field(min_length=1)]
    completion: Annotated[str, Field(min_length=1)]
    label: str | None = None
    schema_version: int = 1
    user_id: str | None = None
    occurred_at: str | None = None
    attributes: Mapping[str, str] = {}

    @property
    def truth(self) -> str:
        """The label; the completion where none is declared."""
        return self.completion if self.label is None else self.label


@dataclass(frozen=True)
class GateSet:
    """A gate set in memory.

    Attributes:
        name: the file's name without its ending.
        sha256: of the file's bytes.
        records: in the file's order.
        answers: for every label the completion that says it, labels in alphabetical order.
        data: "public": exact scores on it may be shown to anybody.
    """

    name: str
    sha256: str
    records: tuple[GateRecord, ...]
    answers: Mapping[str, str]
    data: Literal["public"] = "public"

    @property
    def labels(self) -> tuple[str, ...]:
        """The label space, in the order of a score's columns."""
        return tuple(self.answers)

    @classmethod
    def load(cls, path: Path) -> "GateSet":
        """Read and check a gate set.

        Raises:
            GateSetError: no file, a line that is no record, an event_id twice, a label that is said in two ways,
                or fewer than two labels.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise GateSetError(
                f"gate set {path}: cannot be read ({error.strerror}); see evaluation.gate_set"
            ) from error
        records: list[GateRecord] = []
        seen: dict[str, int] = {}
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                record = GateRecord.model_validate_json(line)
            except ValidationError as error:
                raise GateSetError(f"gate set {path} line {number}: {_first(error)}; correct the line") from error
            if record.event_id in seen:
                raise GateSetError(
                    f"gate set {path} line {number}: event_id={record.event_id!r} as on line {seen[record.event_id]}, "
                    "must be there once; remove one"
                )
            seen[record.event_id] = number
            records.append(record)
        return cls(path.stem, sha256(content).hexdigest(), tuple(records), _answers(records, path))


def _answers(records: list[GateRecord], path: Path) -> dict[str, str]:
    answers: dict[str, str] = {}
    for record in records:
        said = answers.setdefault(record.truth, record.completion)
        if said != record.completion:
            raise GateSetError(
                f"gate set {path}: label={record.truth!r} is said as {said!r} and as {record.completion!r}, "
                "must be one completion a label; it is scored by the likelihood of that"
            )
    if len(answers) < _LABELS_MIN:
        raise GateSetError(f"gate set {path}: labels={len(answers)}, must be >= {_LABELS_MIN}; add labelled records")
    return dict(sorted(answers.items()))


def _first(error: ValidationError) -> str:
    """The first complaint: which key, what is wrong. A gate set is public, so its values may be shown."""
    detail: Any = error.errors(include_url=False)[0]
    key = ".".join(map(str, detail["loc"])) or "line"
    return f"{key}: {detail['msg']}"
