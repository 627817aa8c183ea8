"""Who somebody is to the registry: roles, each for one registered model, and what MLflow must permit for each.

    viewer     reads a model, its versions and their evidence
    trainer    registers versions, and puts away what its rounds made
    approver   says what goes to Production, what leaves it, and what is rejected
    admin      MLflow's own admins: users, webhooks, deletions; and whatever a trainer or an approver may do
    learner    the service's own: a trainer of every stream that may also prune weights
    server     the service's own: reads, and says by the alias `live` what really answers

A role is a role of MLflow's own, named `tidegate:ROLE:MODEL`: only MLflow's admins can give one. MLflow's permissions
are too coarse to tell trainer from approver (EDIT on a model moves stages, writes tags and sets aliases alike, and a
permission on versions holds for all models at once), so they are the outer wall, and `rules.py` the inner one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

_PREFIX = "tidegate"
# Users of the service itself; nobody else may be named like that.
SERVICE_PREFIX = "tidegate-"
# The live alias: what serving says of itself.
LIVE_ALIAS = "live"


class Role(StrEnum):
    """What somebody may do with one registered model."""

    VIEWER = "viewer"
    TRAINER = "trainer"
    APPROVER = "approver"
    ADMIN = "admin"
    LEARNER = "learner"
    SERVER = "server"


# What a person can be given; admin holds for everything, the others for one model.
FOR_PEOPLE = (Role.VIEWER, Role.TRAINER, Role.APPROVER, Role.ADMIN)
SERVICES: Mapping[Role, str] = {Role.LEARNER: f"{SERVICE_PREFIX}learner", Role.SERVER: f"{SERVICE_PREFIX}server"}
_MODEL, _EXPERIMENT = "registered_model", "experiment"
# (MLflow's resource type, whose, permission); whose: the role's model, its experiment, or all of the type.
PERMISSIONS: Mapping[Role, tuple[tuple[str, str, str], ...]] = {
    Role.VIEWER: ((_MODEL, "model", "READ"), (_EXPERIMENT, "experiment", "READ")),
    Role.TRAINER: ((_MODEL, "model", "EDIT"), (_EXPERIMENT, "experiment", "EDIT")),
    Role.APPROVER: ((_MODEL, "model", "EDIT"), (_EXPERIMENT, "experiment", "READ")),
    # Pruning deletes weights out of the artifact store: MANAGE on the tier they lie in, not on the experiment.
    Role.LEARNER: (
        (_MODEL, "model", "EDIT"),
        (_EXPERIMENT, "experiment", "EDIT"),
        ("logged_model", "all", "MANAGE"),
    ),
    Role.SERVER: ((_MODEL, "model", "EDIT"),),
}


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        name: the login; without logins whatever the request claims.
        roles: by registered model.
        admin: whether MLflow says so.
        known: False where MLflow asks for no login: then everybody is everything, and nobody is told from another.
    """

    name: str
    roles: Mapping[str, frozenset[Role]] = field(default_factory=dict)
    admin: bool = False
    known: bool = True

    def has(self, model: str, *wanted: Role) -> bool:
        """Whether they hold one of the roles on a model; an admin counts as any but the service's own."""
        if not self.known:
            return True
        if self.admin and set(wanted) - set(SERVICES):
            return True
        return bool(self.roles.get(model, frozenset()) & set(wanted))

    def has_anywhere(self, *wanted: Role) -> bool:
        """The same on any model at all."""
        return self.has("", *wanted) or any(self.has(model, *wanted) for model in self.roles)


def role_name(role: Role, model: str) -> str:
    """What the role is called in MLflow."""
    return f"{_PREFIX}:{role}:{model}"


def read_roles(names: Iterable[str]) -> dict[str, frozenset[Role]]:
    """Roles by model out of the names of MLflow's roles; what is not Tidegate's is left out."""
    found: dict[str, set[Role]] = {}
    for name in names:
        prefix, _, rest = name.partition(":")
        role, _, model = rest.partition(":")
        if prefix == _PREFIX and model and role in set(Role):
            found.setdefault(model, set()).add(Role(role))
    return {model: frozenset(roles) for model, roles in found.items()}
