"""Who may go to Production, and in which order it happens: for the guard and for `tidegate approve`.

A version goes live only on signed documents, never on a tag or a stage alone:
    verdict    signed by a verdict key, passed, about this very adapter, made against what is live now
    receipt    signed by a receipt key, about this very adapter, with a finite epsilon; or, where the stream never
               promised anything to anybody, with the claim `none`, which the approval then carries
    adapter    the sha256 of what MLflow's artifact store holds equals both
or the version was approved before (a rollback): then its adapter and receipt must still be intact.

Order of a promotion, all of it under one lock (`Approvals.deciding`):
    1. check everything                      nothing has changed yet
    2. append the signed approval            durable; the decision exists
    3. tag it onto the version               serving finds it there
    4. move the stage, archive the old one   one transaction of MLflow's
    5. tidy up: states of all it touches     shown to people, trusted by nobody
Inside MLflow's server 3 to 5 are one transaction; over REST they are steps.
The approval comes before the move on purpose. A crash between 2 and 4 leaves a decision that was not carried
out: the old version stays in Production with its own approval, and the next decision, or the next start of the
guard, begins with `settle`, which adds a row saying that the move never happened. The other order would leave a
version in Production that nobody signed for. A rejection is final once it is signed: `settle` carries it out.

Every change of a stage goes this way (`transition`), also those that decide nothing: what looked like a candidate
when its transition was asked for may be live when it is carried out.

A canary is a decision of its own: the same checks, the same signature, but no move. The version stays in Staging with
the row in its tag `tidegate.canary`, and serving gives it a share of the requests until a later decision ends it.
"""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import structlog

from learner.errors import AdapterError
from privacy.errors import PrivacyError
from privacy.policy import NONE, WITHOUT_PRIVACY
from privacy.signing import TrustedKeys
from registry import states
from registry.approvals import Approval, Approvals, Standing, Verifier
from registry.approvals import standing as standing_of
from registry.canary import CANARY, Terms
from registry.errors import PromotionRefused, RegistryError, UnknownVersion
from registry.fingerprints import Fingerprints
from registry.states import PRODUCTION, STAGING, Change, ModelVersion, State

log = structlog.get_logger()

# The folder inside a version's artifacts that holds the adapter's two files.
ADAPTER_FOLDER = "adapter"
SYSTEM = "tidegate"
# States that whoever registers versions gives them, while nobody has decided on them.
UNDECIDED_ON = frozenset({State.CANDIDATE, State.FAILED, State.UNDECIDED, State.SUPERSEDED, State.STALE})
# The tag of a version whose weights were removed: JSON with at, who, why. It only explains: what decides is the store.
PRUNED = "pruned"
# The tag in which a server that found nobody to sign says that it stepped back: JSON with seq and why.
STEPPED_BACK = "stepped_back"


class Registry(Protocol):
    """What promotion needs of MLflow: in its own process (the guard), or over REST."""

    def versions(self, model: str) -> list[ModelVersion]:
        """Every version of a model."""

    def move(self, model: str, version: int, stage: str, *, archive_existing: bool = False) -> None:
        """Set a stage, unchecked."""

    def set_tag(self, model: str, version: int, key: str, value: str) -> None:
        """Set a tag of a version."""

    def fetch_adapter(self, model: str, version: int, dest: Path) -> Path:
        """The version's adapter files: where they lie if that is a folder here, else copied into `dest`."""


@dataclass(frozen=True)
class Written:
    """What is to be written on a version: its stage (None: as it is), and tags."""

    version: int
    stage: str | None
    tags: Mapping[str, str]


@runtime_checkable
class AtOnce(Protocol):
    """A registry that can write a whole decision in one transaction: MLflow's database, from inside its server."""

    def write(self, model: str, rows: Sequence[Written]) -> None:
        """All of it, or nothing; whatever else stands in Production is archived when one row goes there."""


@dataclass(frozen=True)
class Trust:
    """Whose signatures count for what. Keys are kept apart: a receipt's key cannot sign a verdict."""

    verdicts: Verifier
    receipts: Verifier
    # Registered models of streams that promise nothing to anybody: the only ones that may go without privacy.
    open_models: frozenset[str] = frozenset()

    @classmethod
    def from_dir(cls, keys: Path, open_models: Iterable[str] = ()) -> "Trust":
        """Public keys by their file names: `verdicts*.pub` and `receipts*.pub`, and what they introduced.

        Raises:
            SignatureError: one of the files holds no Ed25519 public key, or a rotation does not hold.
        """
        verdicts, receipts = TrustedKeys.from_dir(keys, "verdicts"), TrustedKeys.from_dir(keys, "receipts")
        return cls(verdicts, receipts, frozenset(open_models))


@dataclass(frozen=True)
class Decision:
    """A promotion that may happen: as what kind, of which adapter, with which guarantee if it is not a finite one."""

    kind: str
    adapter_sha256: str
    guarantee: str = ""


@dataclass(frozen=True)
class _Seen:
    """One model under the lock: its decisions, oldest first, its versions, and what the decisions add up to."""

    history: list[Approval]
    versions: list[ModelVersion]
    standing: Standing


@dataclass(frozen=True)
class Promotions:
    """Promotion, rejection and withdrawal in one registry, written to one history."""

    registry: Registry
    approvals: Approvals
    trust: Trust
    fingerprints: Fingerprints = field(default_factory=Fingerprints)

    def transition(
        self,
        model: str,
        version: int,
        stage: str,
        *,
        who: str,
        why: str,
        archive_existing: bool = False,
        told: str = "",
    ) -> Approval | None:
        """Whatever a change of stage means, decided and carried out under one lock; None where it decides nothing.

        Args:
            model: registered model.
            version: its number.
            stage: in MLflow's spelling.
            who: whoever asks for it.
            why: their reason, kept and signed where something is decided.
            archive_existing: the box on MLflow's page. Production holds one version whatever it says; candidates it
                takes out of Staging are rejected.
            told: the state the version is to have, from a client that knows: `rejected`, or one of
                `UNDECIDED_ON`.

        Raises:
            PromotionRefused, RegistryError: as `promote` and `reject`.
        """
        if stage == PRODUCTION:
            return self.promote(model, version, who=who, why=why)
        with self.approvals.deciding():
            seen = self._settle(model)
            chosen = pick(seen.versions, model, version)
            if told in UNDECIDED_ON:
                self._place(model, chosen, seen, stage=stage, state=State(told))
                return None
            if chosen.stage == PRODUCTION and told != State.REJECTED:
                return self._withdraw(model, chosen, seen, to_stage=stage, who=who, why=why)
            waits = chosen.state is State.CANDIDATE and chosen.stage != stage
            if told == State.REJECTED or (waits and stage in {states.ARCHIVED, states.NO_STAGE}):
                return self._reject(model, chosen, seen, to_stage=stage, who=who, why=why)
            if archive_existing and stage == states.STAGING:
                for other in states.waiting(seen.versions):
                    if other.stage == stage and other.version != version:
                        self._reject(model, other, seen, to_stage=states.ARCHIVED, who=who, why=why)
            self._end_left(model, chosen, seen, stage=stage, who=who, why=why)
            self.registry.move(model, version, stage, archive_existing=archive_existing)
            return None

    def promote(self, model: str, version: int, *, who: str, why: str) -> Approval:
        """Put a version into Production, alone: a candidate, or by rollback one that was live before.

        Asking again for what is live already changes nothing and answers the approval it has (a lost
        response, retried).

        Raises:
            PromotionRefused: the sentence names what does not hold and the way out. Nothing has changed.
            RegistryError: MLflow or the history failed; either nothing has changed or `settle` will say so.
        """
        try:
            with self.approvals.deciding():
                return self._promote(model, version, self._settle(model), who=who, why=why)
        except PromotionRefused as refusal:
            self.approvals.note_refusal(model=model, version=version, who=who, why=why, sentence=str(refusal))
            raise

    def withdraw(self, model: str, version: int, *, to_stage: str, who: str, why: str) -> Approval:
        """Take the live version out of Production, none in its place; servers stay on it, with an alarm."""
        with self.approvals.deciding():
            seen = self._settle(model)
            chosen = pick(seen.versions, model, version)
            return self._withdraw(model, chosen, seen, to_stage=to_stage, who=who, why=why)

    def reject(self, model: str, version: int, *, to_stage: str, who: str, why: str) -> Approval:
        """Say no to a waiting candidate. The same no again (a lost response, retried) answers the row it has.

        Raises:
            PromotionRefused: it is none.
        """
        with self.approvals.deciding():
            seen = self._settle(model)
            chosen = pick(seen.versions, model, version)
            return self._reject(model, chosen, seen, to_stage=to_stage, who=who, why=why)

    def canary(self, model: str, version: int, terms: Terms, *, who: str, why: str) -> Approval:
        """Let a waiting candidate answer a share of requests beside what is live; asked again, change the share.

        Raises:
            PromotionRefused: it is none that waits, does not hold as for a promotion, or another canary runs.
        """
        try:
            return self._canary(model, version, terms, who=who, why=why)
        except PromotionRefused as refusal:
            self.approvals.note_refusal(model=model, version=version, who=who, why=why, sentence=str(refusal))
            raise

    def _canary(self, model: str, version: int, terms: Terms, *, who: str, why: str) -> Approval:
        with self.approvals.deciding():
            seen = self._settle(model)
            chosen = pick(seen.versions, model, version)
            if chosen.stage != STAGING or version in seen.standing.approved:
                raise PromotionRefused(
                    f"{model} version {version} stands in {chosen.stage}: a canary is a candidate that waits in "
                    f"{STAGING}; to a version that was live before one rolls back"
                )
            other = seen.standing.canary["version"] if seen.standing.canary else version
            if other != version:
                raise PromotionRefused(
                    f"{model} version {version}: version {other} is the canary now, and one runs at a time; end it "
                    f"by a share of 0, or reject it"
                )
            decision = self._decide(model, chosen, seen)
            sha, told = decision.adapter_sha256, terms.as_json()
            return self._sign_canary(chosen, sha, decision.guarantee, told, model=model, who=who, why=why)

    def end_canary(
        self, model: str, version: int, *, who: str, why: str, seq: int | None = None, automatic: bool = False
    ) -> Approval:
        """Let what is live answer everything again; the candidate goes on waiting.

        Args:
            model: registered model.
            version: the canary.
            who: decided it.
            why: kept and signed.
            seq: only the canary of that decision: one that was changed meanwhile stays.
            automatic: whether the server stepped back by itself.

        Raises:
            PromotionRefused: it is no canary, or that of another decision.
        """
        with self.approvals.deciding():
            seen = self._settle(model)
            running = seen.standing.canary
            if running is None or running["version"] != version or seq not in {None, running["seq"]}:
                raise PromotionRefused(f"{model} version {version}: is no canary (any more); nothing was changed")
            chosen = pick(seen.versions, model, version)
            return self._sign_canary_end(chosen, running, model=model, who=who, why=why, automatic=automatic)

    def _sign_canary_end(
        self, chosen: ModelVersion, running: Approval, *, model: str, who: str, why: str, automatic: bool = False
    ) -> Approval:
        told = {"share": 0, **({"automatic": True} if automatic else {})}
        sha, guarantee = str(running["adapter_sha256"]), str(running.get("guarantee", ""))
        return self._sign_canary(chosen, sha, guarantee, told, model=model, who=who, why=why)

    def _sign_canary(
        self,
        chosen: ModelVersion,
        sha: str,
        guarantee: str,
        told: dict[str, Any],
        *,
        model: str,
        who: str,
        why: str,
    ) -> Approval:
        approval = self.approvals.append(
            model=model,
            version=chosen.version,
            adapter_sha256=sha,
            from_stage=chosen.stage,
            to_stage=chosen.stage,
            who=who,
            why=why,
            kind=CANARY,
            guarantee=guarantee,
            canary=told,
        )
        self.registry.set_tag(model, chosen.version, f"tidegate.{CANARY}", json.dumps(approval))
        log.info("canary", model=model, version=chosen.version, share=told["share"], seq=approval["seq"])
        return approval

    def settle(self, model: str) -> None:
        """Add the row a crash left out, and carry out what it left undone."""
        with self.approvals.deciding():
            self._settle(model)

    def reconcile(self, model: str) -> None:
        """Settle, and make an emergency lasting that was decided while MLflow was away, if all it needs still holds."""
        with self.approvals.deciding():
            seen = self._settle(model)
            live = seen.standing.live
            if live is None or live["kind"] != "emergency":
                return
            why = f"emergency approval {live['seq']} by {live['who']} made lasting: {live['why']}"
            try:
                self._promote(model, int(live["version"]), seen, who=SYSTEM, why=why)
            except (PromotionRefused, UnknownVersion) as refusal:
                log.warning("emergency not made lasting", model=model, version=live["version"], why=str(refusal))

    def _promote(self, model: str, version: int, seen: _Seen, *, who: str, why: str) -> Approval:
        chosen = pick(seen.versions, model, version)
        if seen.standing.live and _is_live(chosen, seen.standing):
            return seen.standing.live
        decision = self._decide(model, chosen, seen)
        approval = self.approvals.append(
            model=model,
            version=version,
            adapter_sha256=decision.adapter_sha256,
            from_stage=chosen.stage,
            to_stage=PRODUCTION,
            who=who,
            why=why,
            kind=decision.kind,
            guarantee=decision.guarantee,
        )
        changes, tags = states.promote(seen.versions, version), {"tidegate.approval": json.dumps(approval)}
        try:
            self._carry_out(model, chosen, seen, PRODUCTION, changes, tags)
        except Exception:
            if pick(self._settle(model).versions, model, version).stage != PRODUCTION:
                raise
        log.info("version approved", model=model, version=version, kind=decision.kind, seq=approval["seq"])
        return approval

    def _withdraw(
        self, model: str, chosen: ModelVersion, seen: _Seen, *, to_stage: str, who: str, why: str
    ) -> Approval:
        approval = self._record(model, chosen, seen, to_stage=to_stage, who=who, why=why, kind="rollback")
        try:
            self._carry_out(model, chosen, seen, to_stage, states.withdraw(seen.versions, chosen.version))
        except Exception:
            if pick(self._settle(model).versions, model, chosen.version).stage == PRODUCTION:
                raise
        return approval

    def _reject(self, model: str, chosen: ModelVersion, seen: _Seen, *, to_stage: str, who: str, why: str) -> Approval:
        for row in reversed(seen.history):
            if _is_rejection(row, chosen.version) and (row["who"], row["why"]) == (who, why):
                return row
        if chosen.stage == PRODUCTION:
            raise PromotionRefused(
                f"{model} version {chosen.version} is in Production: only a candidate can be rejected; "
                f"nothing was changed"
            )
        try:
            changes = states.reject(seen.versions, chosen.version)
        except ValueError as error:
            raise PromotionRefused(f"{model} {error}; nothing was changed") from None
        approval = self._record(model, chosen, seen, to_stage=to_stage, who=who, why=why, kind="reject")
        self._carry_out(model, chosen, seen, to_stage, changes)
        return approval

    def _place(self, model: str, chosen: ModelVersion, seen: _Seen, *, stage: str, state: State) -> None:
        """Tidying up, by whoever registers versions: no decision, so what was decided on meanwhile stays as it is."""
        rejected = any(_is_rejection(row, chosen.version) for row in seen.history)
        if rejected or chosen.stage == PRODUCTION or chosen.version in seen.standing.approved:
            log.info("not moved: it was decided on", model=model, version=chosen.version, state=str(state))
            return
        self._end_left(model, chosen, seen, stage=stage, who=SYSTEM, why="")
        self.registry.set_tag(model, chosen.version, "tidegate.state", state)
        self.registry.move(model, chosen.version, stage)

    def _end_left(self, model: str, chosen: ModelVersion, seen: _Seen, *, stage: str, who: str, why: str) -> None:
        """A canary that leaves Staging is over, and the history says so."""
        running = seen.standing.canary
        if running and running["version"] == chosen.version and stage != STAGING:
            self._sign_canary_end(chosen, running, model=model, who=who, why=why or f"it left {STAGING}")

    def _carry_out(
        self,
        model: str,
        chosen: ModelVersion,
        seen: _Seen,
        stage: str,
        changes: Iterable[Change],
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Steps 3 to 5: tags and stage of the chosen version, and what follows for it and others."""
        tags = tags or {}
        if not isinstance(self.registry, AtOnce):
            for key, value in tags.items():
                self.registry.set_tag(model, chosen.version, key, value)
            self.registry.move(model, chosen.version, stage, archive_existing=stage == PRODUCTION)
            self._tidy(model, seen.versions, changes, keep_stage_of=chosen.version)
            return
        stood = {v.version: v.stage for v in seen.versions}
        rows = [Written(chosen.version, stage, tags)]
        for change in changes:
            shown = {"tidegate.state": str(change.state)}
            leaves = change.version != chosen.version and stood[change.version] != change.stage
            if change.state is State.RETIRED and stood[change.version] != PRODUCTION:
                leaves = False  # where it lies, there it stays
            rows.append(Written(change.version, change.stage if leaves else None, shown))
        self.registry.write(model, rows)

    def _record(
        self, model: str, chosen: ModelVersion, seen: _Seen, *, to_stage: str, who: str, why: str, kind: str
    ) -> Approval:
        earlier = seen.standing.approved.get(chosen.version, {})
        same = earlier.get("adapter_sha256") == chosen.adapter_sha256
        return self.approvals.append(
            model=model,
            version=chosen.version,
            adapter_sha256=chosen.adapter_sha256,
            from_stage=chosen.stage,
            to_stage=to_stage,
            who=who,
            why=why,
            kind=kind,
            guarantee=str(earlier.get("guarantee", "")) if same else "",
        )

    def _settle_canary(self, model: str, newest: Approval, seen: _Seen) -> bool:
        """Show the newest canary where serving looks, and sign what a server told that found nobody to sign.

        Returns:
            whether that changed anything.
        """
        found = next((v for v in seen.versions if v.version == newest["version"]), None)
        if found is None:
            return False
        if hidden := _document(found.tag(CANARY)) != newest:
            self.registry.set_tag(model, found.version, f"tidegate.{CANARY}", json.dumps(newest))
        stepped_back = _document(found.tag(STEPPED_BACK))
        if not newest["canary"]["share"] or stepped_back.get("seq") != newest["seq"]:
            return hidden
        why = str(stepped_back.get("why", ""))[:1000]
        self._sign_canary_end(found, newest, model=model, who=SYSTEM, why=why, automatic=True)
        return True

    def _look(self, model: str) -> _Seen:
        history = self.approvals.history(model)
        return _Seen(history, self.registry.versions(model), standing_of(history))

    def _settle(self, model: str) -> _Seen:
        """What there is, with history and MLflow in agreement: what a crash or a move past the guard left is mended."""
        seen = self._look(model)
        canary = seen.standing.canary or next((row for row in seen.history[-1:] if row["kind"] == CANARY), None)
        if canary is not None and self._settle_canary(model, canary, seen):
            seen = self._look(model)
        while missing := _left_out(seen):  # a row for each fault: with each, what is live is another
            self.approvals.append(model=model, **missing)
            log.warning("history settled", model=model, version=missing["version"], why=missing["why"])
            seen = self._look(model)
        if changes := _left_undone(seen):
            self._tidy(model, seen.versions, changes)
            log.warning("registry settled", model=model, states={c.version: str(c.state) for c in changes})
            seen = self._look(model)
        return seen

    def objection(self, model: str, version: int) -> str:
        """Why a version would be refused now, by its documents; empty when they hold. Changes nothing.

        The stored adapter is not read: that is for the decision itself.
        """
        seen = self._look(model)
        chosen = pick(seen.versions, model, version)
        try:
            self._proven(model, chosen, seen)
        except PromotionRefused as refusal:
            return str(refusal)
        if chosen.tag(PRUNED):
            return f"{model} version {version}: its weights were pruned ({_pruned(chosen)})"
        return ""

    def _decide(self, model: str, chosen: ModelVersion, seen: _Seen) -> Decision:
        """Check everything a version must prove; says no with the first thing that does not hold."""
        decision = self._proven(model, chosen, seen)
        self._intact(f"{model} version {chosen.version}", model, chosen, decision.adapter_sha256)
        return decision

    def _proven(self, model: str, chosen: ModelVersion, seen: _Seen) -> Decision:
        """The same by its documents alone."""
        name = f"{model} version {chosen.version}"
        earlier = seen.standing.approved.get(chosen.version)
        if earlier is not None:
            sha, kind = str(earlier["adapter_sha256"]), "rollback"
        else:
            _refuse_state(name, chosen, seen.history)
            sha, kind = _passed(name, chosen, seen.standing, self.trust.verdicts), "promote"
        guarantee = _receipted(name, chosen, sha, self.trust.receipts, open_stream=model in self.trust.open_models)
        return Decision(kind, sha, guarantee)

    def _intact(self, name: str, model: str, chosen: ModelVersion, sha: str) -> None:
        if chosen.adapter_sha256 != sha:
            raise PromotionRefused(
                f"{name}: its tag names adapter {_short(chosen.adapter_sha256)}, its documents "
                f"{_short(sha)}; the tag was changed: set it back, or promote another version"
            )
        with tempfile.TemporaryDirectory() as folder:
            try:
                stored = self.fingerprints.sha256(self.registry.fetch_adapter(model, chosen.version, Path(folder)))
            except (AdapterError, RegistryError) as error:
                if chosen.tag(PRUNED):
                    raise PromotionRefused(
                        f"{name}: its weights were pruned ({_pruned(chosen)}), so it cannot answer again: promote "
                        f"another version; registry.keep_previous says how many of those once live are kept"
                    ) from error
                raise PromotionRefused(
                    f"{name}: its adapter cannot be read from the artifact store ({error}); "
                    f"restore it, or promote another version"
                ) from error
        if stored != sha:
            raise PromotionRefused(
                f"{name}: the stored adapter has sha256 {_short(stored)}, its verdict was about "
                f"{_short(sha)}; the artifact was changed: restore it, or promote another version"
            )

    def _tidy(
        self, model: str, versions: Iterable[ModelVersion], changes: Iterable[Change], keep_stage_of: int = 0
    ) -> None:
        """Write what people see. It decides nothing: a failure here is logged and the decision stands."""
        stage = {v.version: v.stage for v in versions}
        for change in changes:
            try:
                self.registry.set_tag(model, change.version, "tidegate.state", change.state)
                moved = change.state in {State.LIVE, State.RETIRED} or change.version == keep_stage_of
                if not moved and stage[change.version] != change.stage:
                    self.registry.move(model, change.version, change.stage)
            except Exception as error:  # noqa: BLE001 - the decision is signed and carried out
                log.warning("state not shown", model=model, version=change.version, error=str(error))


def pick(versions: Iterable[ModelVersion], model: str, number: int) -> ModelVersion:
    """One version by its number.

    Raises:
        UnknownVersion: the model has no such version.
    """
    known = {v.version: v for v in versions}
    if number not in known:
        raise UnknownVersion(f"{model} version {number}: there is none; it has {sorted(known) or 'none yet'}")
    return known[number]


def signed_tag(version: ModelVersion, tag: str, keys: Verifier, name: str) -> dict[str, Any]:
    """The payload of a signed tag.

    Raises:
        PromotionRefused: missing, not JSON, or its signature does not hold.
    """
    text = version.tag(tag)
    if not text:
        raise PromotionRefused(
            f"{name} has no signed {tag}; it did not come out of a round: promote a version that did"
        )
    try:
        document = json.loads(text)
        return keys.verify(document)
    except (ValueError, TypeError, KeyError, PrivacyError) as error:
        raise PromotionRefused(
            f"{name}: its {tag} does not verify ({error}); it was changed or signed by an unknown key: "
            f"promote another version, or add the key to the workspace's keys"
        ) from error


def proven(model: str, version: ModelVersion, trust: Trust) -> str:
    """The adapter that a version's signed verdict found passed and its signed receipt guarantees.

    That is what a promotion asks for before it looks at what is live: without it a version answers nobody, not even
    a person who is to judge it.

    Raises:
        PromotionRefused: one of the documents does not hold.
    """
    name = f"{model} version {version.version}"
    sha = str(_verdict(name, version, trust.verdicts).get("adapter_sha256"))
    _receipted(name, version, sha, trust.receipts, open_stream=model in trust.open_models)
    return sha


def _left_out(seen: _Seen) -> dict[str, Any] | None:
    """The row that is missing from the history: of a move that never happened, or that nobody wrote down.

    Emergencies are left out of account: they are decided while MLflow is away, and no stage says so until a decision
    makes them lasting.
    """
    carried = [row for row in seen.history if row["kind"] != "emergency"]
    live = standing_of(carried).live
    moves = [row for row in carried if PRODUCTION in (row["from"], row["to"])]
    last = live or (moves[-1] if moves else None)
    if last is None:
        return None
    found = next((v for v in seen.versions if v.version == last["version"]), None)
    stage = found.stage if found else states.ARCHIVED
    # The state is written after the move, and before the next decision: without it the move never happened.
    shown_live = found is not None and found.state is State.LIVE
    row = {
        "version": last["version"],
        "adapter_sha256": last["adapter_sha256"],
        "who": SYSTEM,
        "guarantee": str(last.get("guarantee", "")),
    }
    if live is not None and stage != PRODUCTION:
        row |= {"from_stage": PRODUCTION, "to_stage": stage}
        if shown_live or found is None:
            return {**row, "kind": "rollback", "why": "found outside Production: moved past the guard"}
        return {**row, "kind": "reject", "why": "approved, but MLflow never moved it"}
    if live is None and last["kind"] == "rollback" and stage == PRODUCTION and shown_live:
        why = "withdrawn, but MLflow never moved it"
        return {**row, "from_stage": last["to"], "to_stage": PRODUCTION, "kind": "rollback", "why": why}
    return None


def _left_undone(seen: _Seen) -> tuple[Change, ...]:
    """What a decision that is in the history has not brought about in MLflow."""
    live = standing_of([row for row in seen.history if row["kind"] != "emergency"]).live
    known = {v.version: v for v in seen.versions}
    changes: tuple[Change, ...] = ()
    if live is not None and known[live["version"]].state is not State.LIVE:  # it is in Production: see `_left_out`
        changes = states.promote(seen.versions, live["version"])
    elif left := [v.version for v in seen.versions if v.state is State.LIVE and v.stage != PRODUCTION]:
        changes = tuple(Change(version, State.RETIRED) for version in left)
        changes += states.stale(seen.versions, live["adapter_sha256"] if live else "")
    rejected = {row["version"] for row in seen.history if _is_rejection(row, row["version"])}
    shown = {v.version for v in seen.versions if v.state is State.REJECTED}
    return changes + tuple(Change(version, State.REJECTED) for version in sorted((rejected & set(known)) - shown))


def _is_rejection(row: Approval, version: int) -> bool:
    return bool(row["version"] == version and row["kind"] == "reject" and row["from"] != PRODUCTION)


def _is_live(chosen: ModelVersion, standing: Standing) -> bool:
    live = standing.live
    if live is None or live["kind"] == "emergency":
        return False  # an emergency is made lasting by deciding the same again
    return bool(chosen.stage == PRODUCTION and live["version"] == chosen.version)


def _refuse_state(name: str, chosen: ModelVersion, history: Iterable[Approval]) -> None:
    for row in history:
        if _is_rejection(row, chosen.version):
            raise PromotionRefused(
                f"{name} was rejected by {row['who']} at {row['when']} ({row['why'] or 'no reason given'}); "
                f"a rejection is final: promote a version of a later round"
            )
    if chosen.state is State.SUPERSEDED:
        raise PromotionRefused(f"{name} is superseded: a newer candidate took its place; promote that one")


def _passed(name: str, chosen: ModelVersion, standing: Standing, keys: Verifier) -> str:
    """The adapter a passed verdict is about, when it was judged against what is live."""
    verdict = _verdict(name, chosen, keys)
    live = standing.live["adapter_sha256"] if standing.live else ""
    if (verdict.get("parent_sha256") or "") != live:
        now = f"version {standing.live['version']} is live now" if standing.live else "no version is live now"
        raise PromotionRefused(
            f"{name} is stale: it was trained from {_short(verdict.get('parent_sha256'))}, but {now}; "
            f"wait for the next round, or roll back to its parent first"
        )
    return str(verdict.get("adapter_sha256"))


def _verdict(name: str, chosen: ModelVersion, keys: Verifier) -> dict[str, Any]:
    """The signed verdict, when it says passed."""
    verdict = signed_tag(chosen, "verdict", keys, name)
    if verdict.get("outcome") != "passed":
        raise PromotionRefused(
            f"{name} cannot go to Production: its signed verdict says {verdict.get('outcome')}; "
            f"read the gates on its page, and promote a version that passed"
        )
    return verdict


def _receipted(name: str, chosen: ModelVersion, sha: str, keys: Verifier, *, open_stream: bool) -> str:
    """What the approval must say of the guarantee: nothing where it is finite, `none` where there is no privacy."""
    receipt = signed_tag(chosen, "receipt", keys, name)
    if receipt.get("adapter_sha256") != sha:
        raise PromotionRefused(
            f"{name}: its privacy receipt is about adapter {_short(receipt.get('adapter_sha256'))}, "
            f"its verdict about {_short(sha)}; promote a version whose documents agree"
        )
    if receipt.get("guarantee", {}).get("claim") == NONE:
        if not open_stream:
            raise PromotionRefused(f"{name} {WITHOUT_PRIVACY}")
        return NONE
    epsilon = receipt.get("guarantee", {}).get("epsilon")
    try:
        finite = isfinite(float(epsilon))
    except (TypeError, ValueError):
        finite = False
    if not finite:
        raise PromotionRefused(
            f"{name} has no privacy guarantee (epsilon={epsilon}): it was trained with reproducible "
            f"test noise; promote a version of a real round"
        )
    return ""


def _document(tag: str) -> dict[str, Any]:
    """What a tag holds; nothing when it is no JSON object."""
    try:
        return dict(json.loads(tag or "{}"))
    except (ValueError, TypeError):
        return {}


def _pruned(version: ModelVersion) -> str:
    try:
        told = json.loads(version.tag(PRUNED))
        return f"{told['at']} by {told['who']}"
    except (ValueError, TypeError, KeyError):
        return "at an unknown time"


def _short(sha: Any) -> str:
    return str(sha)[:12] if sha else "the bare base"
