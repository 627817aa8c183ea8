"""What may become of a version: a pure state machine over (versions, live); it changes nothing.

    candidate ──promote──▶ live ──(another is promoted, or it is withdrawn)──▶ retired
        │                   ▲                                                     │
        │                   └──────────────────── rollback ───────────────────────┘
        ├──reject────▶ rejected       a person said no; final
        ├──supersede─▶ superseded     a newer candidate took its place; final
        └──stale─────▶ stale          its parent is no longer live; promotable again only if the parent
        returns
    failed, undecided                 what the gates said; final

A state stands in the tag `tidegate.state`, which anyone who may write tags can forge. So states decide what
is shown and tidied up; whether a version may go live is decided from signed documents (`promotion.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

STAGING = "Staging"
PRODUCTION = "Production"
ARCHIVED = "Archived"
NO_STAGE = "None"
TAG = "tidegate."


class State(StrEnum):
    """What a version is."""

    CANDIDATE = "candidate"
    LIVE = "live"
    RETIRED = "retired"
    REJECTED = "rejected"
    STALE = "stale"
    SUPERSEDED = "superseded"
    FAILED = "failed"
    UNDECIDED = "undecided"


MAY_BECOME: Mapping[State, frozenset[State]] = {
    State.CANDIDATE: frozenset({State.LIVE, State.REJECTED, State.STALE, State.SUPERSEDED}),
    State.LIVE: frozenset({State.RETIRED}),
    State.RETIRED: frozenset({State.LIVE}),
    State.STALE: frozenset({State.LIVE, State.REJECTED, State.SUPERSEDED}),
    State.REJECTED: frozenset(),
    State.SUPERSEDED: frozenset(),
    State.FAILED: frozenset(),
    State.UNDECIDED: frozenset(),
}
STAGE_OF: Mapping[State, str] = {
    State.CANDIDATE: STAGING,
    State.LIVE: PRODUCTION,
    **dict.fromkeys(set(State) - {State.CANDIDATE, State.LIVE}, ARCHIVED),
}


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model, as MLflow tells it.

    Attributes:
        version: its number, 1 and up.
        stage: None, Staging, Production or Archived.
        tags: all its tags.
        created_at: UTC, RFC 3339.
        run_id: the MLflow run that holds its evidence.
        aliases: such as `live`.
        description: markdown.
    """

    version: int
    stage: str
    tags: Mapping[str, str]
    created_at: str
    run_id: str
    aliases: tuple[str, ...]
    description: str

    def tag(self, name: str) -> str:
        """The tag `tidegate.NAME`, or the empty string."""
        return self.tags.get(TAG + name, "")

    @property
    def state(self) -> State | None:
        """The tag `tidegate.state`; None when it is missing or no known state."""
        value = self.tag("state")
        return State(value) if value in set(State) else None

    @property
    def adapter_sha256(self) -> str:
        """Which adapter it claims to be."""
        return self.tag("adapter_sha256")

    @property
    def parent_sha256(self) -> str:
        """Which adapter it claims to be trained from; empty for the bare base."""
        return self.tag("parent_sha256")


@dataclass(frozen=True)
class Change:
    """A version's next state, and the stage that goes with it."""

    version: int
    state: State

    @property
    def stage(self) -> str:
        """Where MLflow shows a version of this state."""
        return STAGE_OF[self.state]


def promote(versions: Sequence[ModelVersion], number: int) -> tuple[Change, ...]:
    """What follows when a version goes live, by promotion or by rollback.

    It becomes live, what stood in Production retires, and every other candidate with another parent is stale.
    """
    chosen = _pick(versions, number)
    left = [Change(v.version, State.RETIRED) for v in in_production(versions) if v.version != number]
    others = [v for v in versions if v.version != number]
    return (Change(number, State.LIVE), *left, *stale(others, chosen.adapter_sha256))


def withdraw(versions: Sequence[ModelVersion], number: int) -> tuple[Change, ...]:
    """What follows when the live version leaves Production and none takes its place."""
    others = [v for v in versions if v.version != number]
    return (Change(number, State.RETIRED), *stale(others, ""))


def reject(versions: Sequence[ModelVersion], number: int) -> tuple[Change, ...]:
    """What follows when a person says no to a waiting candidate.

    Raises:
        ValueError: the version is nothing that can be rejected; the message says what it is.
    """
    state = _pick(versions, number).state
    if state is None or State.REJECTED not in MAY_BECOME[state]:
        raise ValueError(f"version {number} is {state or 'of no known state'}: only a candidate can be rejected")
    return (Change(number, State.REJECTED),)


def supersede(versions: Sequence[ModelVersion], newest: int) -> tuple[Change, ...]:
    """What follows when a newer candidate takes the place of those that wait: one waits at a time."""
    return tuple(Change(v.version, State.SUPERSEDED) for v in waiting(versions) if v.version < newest)


def stale(versions: Sequence[ModelVersion], live_sha256: str) -> tuple[Change, ...]:
    """Candidates whose parent is not the live adapter (empty: none is live)."""
    return tuple(Change(v.version, State.STALE) for v in waiting(versions) if v.parent_sha256 != live_sha256)


def waiting(versions: Sequence[ModelVersion]) -> list[ModelVersion]:
    """Candidates, oldest first."""
    return sorted((v for v in versions if v.state is State.CANDIDATE), key=lambda v: v.version)


def in_production(versions: Sequence[ModelVersion]) -> list[ModelVersion]:
    """What stands in Production, oldest first: one at most where the guard rules, more where it does not."""
    return sorted((v for v in versions if v.stage == PRODUCTION), key=lambda v: v.version)


def _pick(versions: Sequence[ModelVersion], number: int) -> ModelVersion:
    for version in versions:
        if version.version == number:
            return version
    raise ValueError(f"version {number}: not among {sorted(v.version for v in versions)}")
