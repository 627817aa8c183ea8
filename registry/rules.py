"""What a caller may change in the registry: one rule a gate of `routes.py`, each a yes or a sentence.

Two kinds of no. Some things nobody may do, with logins or without: overwrite what a decision rests on or was about
(signed tags, evidence, an adapter's files), copy a version, take away what history speaks of. The rest is a question
of roles, and without logins everybody has them all.

What is left to MLflow is what nothing here trusts. The rules do not make a version trusted either: they keep it
available and legible. That an unapproved version never answers rests on signatures, which serving checks itself.
"""

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from registry.approvals import Approvals
from registry.errors import PromotionRefused
from registry.promotion import UNDECIDED_ON
from registry.registrars import Registrars
from registry.roles import LIVE_ALIAS, Caller, Role
from registry.routes import Gate
from registry.states import PRODUCTION, STAGING, TAG, ModelVersion, State

# Tags of a version by which a program says where it stands; all others of Tidegate's are proofs or facts.
_STATE, _PRUNED = f"{TAG}state", f"{TAG}pruned"
_MOVABLE = {_STATE: (Role.TRAINER, Role.LEARNER), _PRUNED: (Role.LEARNER, Role.ADMIN)}
# The guard's own, also when a version is made.
_GUARDS_OWN = frozenset(
    {f"{TAG}{name}" for name in ("approval", "canary", "registered_by", "stepped_back")} | {_PRUNED}
)
# Marks a model as a prompt of MLflow's, which hides its versions and takes it out of its permissions.
_PROMPT = "mlflow.prompt."
_IN_STORE = re.compile(r"\d+/(?:models/(?P<model>m-[^/]+)|(?P<run>[0-9a-f]{32}))(?:/|$)")
_COPY = re.compile(r"models:/+(?P<name>[^/@]+)[/@]")


class Share(StrEnum):
    """What a transition says of a canary: a candidate that answers a share of the requests."""

    NONE = ""
    GIVE = "give"
    END = "end"
    STEP_BACK = "step back"  # serving ends it by itself


class Shelf(Protocol):
    """What the rules ask MLflow."""

    def versions(self, model: str) -> list[ModelVersion]:
        """Every version of a model."""

    def holders(self, *, run_id: str = "", logged_model: str = "", sha256: str = "") -> list[tuple[str, ModelVersion]]:
        """Versions of any model by their run, by the logged model they point at, or by the adapter they name."""

    def is_prompt(self, model: str) -> bool:
        """Whether a name is that of a prompt."""


@dataclass(frozen=True)
class Change:
    """What a request would change, as MLflow's own parser reads it.

    Attributes:
        route: method and bare path, for sentences.
        path: of a file in the artifact store. recursive: whether all below it goes as well.
        experiment: its name.
        archives: whether a transition takes others out of the stage.
        told: the state a version is to have, from a client that knows.
    """

    gate: Gate
    route: str
    model: str = ""
    version: int = 0
    stage: str = ""
    key: str = ""
    alias: str = ""
    source: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    run_ids: tuple[str, ...] = ()
    logged_model: str = ""
    path: str = ""
    recursive: bool = False
    experiment: str = ""
    archives: bool = False
    told: str = ""
    share: Share = Share.NONE


@dataclass(frozen=True)
class Rules:
    """The rules over one registry.

    Attributes:
        solo_models: models whose versions may be promoted by whom registered them.
    """

    shelf: Shelf
    approvals: Approvals
    registrars: Registrars
    solo_models: frozenset[str] = frozenset()

    def judge(self, change: Change, caller: Caller) -> None:
        """Say nothing, or why not.

        Raises:
            PromotionRefused: names who may not do what, and the way out.
        """
        rule: Callable[[Change, Caller], None] = {
            Gate.WORK: self._work,
            Gate.RUN: self._run,
            Gate.LOGGED_MODEL: self._logged_model,
            Gate.ARTIFACT: self._artifact,
            Gate.EXPERIMENT: self._experiment,
            Gate.MODEL_CREATE: self._model_create,
            Gate.MODEL_DESCRIBE: self._model_describe,
            Gate.MODEL_REMOVE: self._model_remove,
            Gate.ALIAS: self._alias,
            Gate.VERSION_CREATE: self._version_create,
            Gate.VERSION_DESCRIBE: self._version_describe,
            Gate.VERSION_TAG: self._version_tag,
            Gate.VERSION_REMOVE: self._version_remove,
            Gate.TRANSITION: self._transition,
            Gate.ADMIN: self._admin,
            Gate.CLOSED: _closed,
        }.get(change.gate, _pass)
        rule(change, caller)

    def _transition(self, change: Change, caller: Caller) -> None:
        model, version = change.model, change.version
        if not caller.known or not model or not version:
            return  # everybody may decide; or MLflow names the field
        chosen = next((v for v in self.shelf.versions(model) if v.version == version), None)
        if chosen is None:
            return
        if change.share is Share.STEP_BACK:
            _need(caller, model, f"step back from {model} version {version}", Role.SERVER, Role.APPROVER)
            return
        answers = change.stage == PRODUCTION or change.share is Share.GIVE
        waits = chosen.state is State.CANDIDATE and change.stage != STAGING
        decides = chosen.stage == PRODUCTION or waits or change.archives or change.told == State.REJECTED
        decides = decides or change.share is Share.END
        if not answers and (change.told in UNDECIDED_ON or not decides):
            _need(caller, model, f"move {model} version {version}", Role.TRAINER, Role.APPROVER, Role.LEARNER)
            return
        _need(caller, model, f"decide on {model} version {version}", Role.APPROVER)
        if answers and model not in self.solo_models:
            self._four_eyes(model, chosen, caller)

    def _four_eyes(self, model: str, chosen: ModelVersion, caller: Caller) -> None:
        name = f"{model} version {chosen.version}"
        if chosen.version in self.approvals.standing(model).approved:
            return  # somebody else looked at it once: going back to it is no new trust
        registrar = self.registrars.of(model, chosen.version)
        if registrar is None:
            raise PromotionRefused(
                f"{name}: nobody can say who registered it, it is older than the logins; wait for the next round, "
                f"or let one person do both by registry.four_eyes: false"
            )
        if registrar == caller.name:
            raise PromotionRefused(
                f"{name} was registered by {caller.name}: somebody else must approve it (four eyes); ask an approver, "
                f"or let one person do both by registry.four_eyes: false"
            )

    def _version_create(self, change: Change, caller: Caller) -> None:
        model = change.model
        _need(caller, model, f"register versions of {model}", Role.TRAINER, Role.LEARNER)
        for key in change.tags:
            if key in _GUARDS_OWN:
                raise PromotionRefused(f"{model}: the tag {key} is written by the guard alone; leave it out")
            self._no_prompt(model, key)
        copied = _COPY.match(change.source)
        if copied and any(_has_papers(v) for v in self.shelf.versions(copied["name"])):
            raise PromotionRefused(
                f"{model}: a version of {copied['name']} cannot be copied: its verdict and its receipt are about that "
                f"stream's data; run a round of the stream, or promote it there"
            )
        sha = change.tags.get(f"{TAG}adapter_sha256", "")
        papers = {_signature(change.tags.get(f"{TAG}{name}", "")) for name in ("verdict", "receipt")} - {""}
        for other, version in self.shelf.holders(sha256=sha) if sha and papers else ():
            if papers & {_signature(version.tag("verdict")), _signature(version.tag("receipt"))}:
                raise PromotionRefused(
                    f"{model}: these documents are those of {other} version {version.version}; what was judged once "
                    f"is not registered again: promote that version, or run another round"
                )

    def _version_tag(self, change: Change, caller: Caller) -> None:
        model, name = change.model, f"{change.model} version {change.version}"
        if change.key in _MOVABLE:
            _need(caller, model, f"write {change.key} of {name}", *_MOVABLE[change.key])
        elif change.key.startswith(TAG):
            raise PromotionRefused(
                f"{name}: the tag {change.key} is part of its proof and stays as it was registered; "
                f"add a tag of another name, or run another round"
            )
        else:
            self._no_prompt(model, change.key)
            _need(caller, model, f"tag {name}", Role.TRAINER, Role.APPROVER, Role.LEARNER)

    def _version_describe(self, change: Change, caller: Caller) -> None:
        name = f"{change.model} version {change.version}"
        chosen = next((v for v in self.shelf.versions(change.model) if v.version == change.version), None)
        if chosen is not None and _has_papers(chosen):
            raise PromotionRefused(
                f"{name}: its description is the evidence that it is approved on, and stays; "
                f"say what you think in the reason of the decision, or in a tag"
            )
        _need(caller, change.model, f"describe {name}", Role.TRAINER, Role.LEARNER)

    def _version_remove(self, change: Change, caller: Caller) -> None:
        name = f"{change.model} version {change.version}"
        decided = any(row["version"] == change.version for row in self.approvals.history(change.model))
        chosen = next((v for v in self.shelf.versions(change.model) if v.version == change.version), None)
        if decided or (chosen is not None and chosen.stage == PRODUCTION):
            raise PromotionRefused(
                f"{name} is in the history of decisions and stays: an audit and a rollback need it; "
                f"`tidegate prune` removes the weights of those that nobody needs"
            )
        _need(caller, change.model, f"delete {name}", Role.ADMIN)

    def _alias(self, change: Change, caller: Caller) -> None:
        if change.alias != LIVE_ALIAS:
            _need(caller, change.model, f"set aliases of {change.model}", Role.APPROVER)
            return
        _need(caller, change.model, f"say what of {change.model} is {LIVE_ALIAS}", Role.SERVER, Role.ADMIN)
        if change.version and change.version not in self.approvals.standing(change.model).approved:
            raise PromotionRefused(
                f"{change.model} version {change.version} was never approved, so it cannot be {LIVE_ALIAS}; "
                f"approve it first: set Production, or `tidegate approve`"
            )

    def _model_create(self, change: Change, caller: Caller) -> None:
        del change
        if not caller.has_anywhere(Role.ADMIN, Role.LEARNER):
            raise PromotionRefused(
                f"{caller.name} may not make a registered model: that takes an admin; a stream of params.yaml gets "
                f"its model when MLflow starts"
            )

    def _model_describe(self, change: Change, caller: Caller) -> None:
        if change.key.startswith(TAG):
            raise PromotionRefused(f"{change.model}: tags beginning with {TAG} are Tidegate's own; choose another name")
        self._no_prompt(change.model, change.key)
        _need(caller, change.model, f"describe {change.model}", Role.TRAINER, Role.APPROVER, Role.LEARNER)

    def _model_remove(self, change: Change, caller: Caller) -> None:
        if self.approvals.history(change.model) or any(_has_papers(v) for v in self.shelf.versions(change.model)):
            raise PromotionRefused(
                f"{change.model} has a history, so it is neither renamed nor deleted: decisions and receipts name it; "
                f"give a new stream a new registry.model, and free space by `tidegate prune`"
            )
        _need(caller, change.model, f"rename or delete {change.model}", Role.ADMIN)

    def _no_prompt(self, model: str, key: str) -> None:
        if key.startswith(_PROMPT) and not self.shelf.is_prompt(model):
            raise PromotionRefused(
                f"{model}: the tag {key} would make it a prompt, which hides its versions; register prompts by "
                f"MLflow's own `register_prompt`, under another name"
            )

    def _work(self, change: Change, caller: Caller) -> None:
        if not caller.has_anywhere(Role.TRAINER, Role.LEARNER):
            raise PromotionRefused(
                f"{caller.name} may only read here ({change.route}): writing takes the role trainer on a model; "
                f"an admin gives it by `tidegate users grant {caller.name} trainer STREAM`"
            )

    def _run(self, change: Change, caller: Caller) -> None:
        self._work(change, caller)
        for run_id in change.run_ids:
            _refuse_kept(self.shelf.holders(run_id=run_id), f"run {run_id}")

    def _logged_model(self, change: Change, caller: Caller) -> None:
        self._work(change, caller)
        _refuse_kept(self.shelf.holders(logged_model=change.logged_model), f"logged model {change.logged_model}")

    def _artifact(self, change: Change, caller: Caller) -> None:
        self._work(change, caller)
        path = posixpath.normpath(change.path.strip("/"))
        found = _IN_STORE.match(path)
        if found is None:
            if change.recursive:
                raise PromotionRefused(
                    f"artifacts {path}: would go with everything below, also what versions need; delete by run or by "
                    f"file, or let `tidegate prune` do it"
                )
            return
        kept = self.shelf.holders(run_id=found["run"] or "", logged_model=found["model"] or "")
        if change.recursive and found["model"] and caller.has_anywhere(Role.LEARNER, Role.ADMIN):
            for model, version in kept:
                live = self.approvals.standing(model).live
                if version.stage == PRODUCTION or (live and live["version"] == version.version):
                    raise PromotionRefused(
                        f"artifacts {path}: {model} version {version.version} is live; put another in its place first"
                    )
            return  # pruning: the papers stay in the run
        _refuse_kept(kept, f"artifacts {path}")

    def _experiment(self, change: Change, caller: Caller) -> None:
        self._work(change, caller)
        if any(_has_papers(v) for v in self.shelf.versions(change.experiment)):
            raise PromotionRefused(
                f"experiment {change.experiment}: it holds the evidence of registered versions, so it is neither "
                f"renamed nor deleted; make another for other work"
            )

    def _admin(self, change: Change, caller: Caller) -> None:
        if caller.known and not caller.admin:
            raise PromotionRefused(
                f"{caller.name} may not do this ({change.route}): it takes an admin; users and roles: `tidegate users`"
            )


def _pass(_change: Change, _caller: Caller) -> None:
    """Left to MLflow."""


def _closed(change: Change, _caller: Caller) -> None:
    raise PromotionRefused(
        f"{change.route} is closed on this server: it would go round the guard, run code here or call other "
        f"machines from here; use an MLflow of your own for that"
    )


def _need(caller: Caller, model: str, what: str, *roles: Role) -> None:
    if not caller.has(model, *roles):
        given = [role for role in roles if role not in {Role.LEARNER, Role.SERVER}]
        way = f"tidegate users grant {caller.name} {given[0]} STREAM" if given else "tidegate serve"
        how = "an admin gives it by" if given else "the server does it:"
        raise PromotionRefused(f"{caller.name} may not {what}: that takes the role {_either(roles)}; {how} `{way}`")


def _either(roles: Iterable[Role]) -> str:
    return " or ".join(role.value for role in roles)


def _has_papers(version: ModelVersion) -> bool:
    return bool(version.tag("verdict") or version.tag("receipt"))


def _refuse_kept(kept: Iterable[tuple[str, ModelVersion]], what: str) -> None:
    for model, version in kept:
        if _has_papers(version):
            raise PromotionRefused(
                f"{what} belongs to {model} version {version.version} and stays as it was judged; "
                f"write into a run of your own, and free space by `tidegate prune`"
            )


def _signature(text: str) -> str:
    """The signature of a signed tag, or the empty string."""
    try:
        found: Any = json.loads(text)
        return str(found["signature"])
    except (ValueError, TypeError, KeyError):
        return ""
