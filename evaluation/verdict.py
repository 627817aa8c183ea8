"""What an evaluation found, and the signed verdict that the registry's guard trusts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from evaluation.examples import Example
    from evaluation.gates import CandidateFacts
    from evaluation.metrics import Score
    from evaluation.private import PrivateScores

Outcome = Literal["passed", "failed", "undecided"]


class Signer(Protocol):
    """A signing key, as in privacy.signing."""

    def sign(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The payload with key id and signature."""
        ...


@dataclass(frozen=True)
class Gate:
    """One gate and what came of it.

    Attributes:
        version: of the metric; two values compare only when it is the same.
        outcome: an advisory gate's failure is shown and decides nothing.
        sentence: what was found, for a person.
        value: what was measured; None when it was not.
        se: standard error of value, None where it has none.
        n: how many records it rests on.
        bound: what passes, in words.
        p: of the test, when the gate is one.
        hard: whether it decides.
        data: "public", or "private": judged on noisy counts of the holdout; charge_id then names what they cost.
    """

    name: str
    version: str
    outcome: Outcome
    sentence: str
    bound: str
    value: float | None = None
    se: float | None = None
    n: int | None = None
    p: float | None = None
    hard: bool = True
    data: Literal["public", "private"] = "public"
    charge_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON form, with every field."""
        return asdict(self)


@dataclass(frozen=True)
class ModelScores:
    """One model on one slice."""

    accuracy: Score
    macro_f1: Score


@dataclass(frozen=True)
class Slice:
    """A domain, or all records together (domain "").

    Attributes:
        majority: share of the most frequent label: what a constant answer gets.
        candidate, live, base: None where there is none, or where it could not be scored.
        gain_over_base, gain_over_live: of accuracy, paired.
        p_worse_than_live: Holm-adjusted over all slices that were tested; None where it was not.
    """

    domain: str
    n: int
    majority: float
    candidate: ModelScores | None = None
    live: ModelScores | None = None
    base: ModelScores | None = None
    gain_over_base: Score | None = None
    gain_over_live: Score | None = None
    p_worse_than_live: float | None = None


@dataclass(frozen=True)
class Figure:
    """One metric of one model on one slice.

    Attributes:
        metric: its name.
        unit: share, or the unit's name.
        better: "higher" or "lower".
        role: candidate, live or base.
        domain: "" for all records.
        options: those that are not the metric's defaults.
    """

    metric: str
    version: str
    unit: str
    better: str
    role: str
    domain: str
    score: Score
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The contract's verdict, before its signature.

    Attributes:
        not_measured: what this verdict does not speak of, and why.
        policy_sha256: of what was asked: two verdicts compare when it is the same.
    """

    adapter_sha256: str
    parent_sha256: str | None
    base_sha256: str
    outcome: Outcome
    reasons: tuple[str, ...]
    gates: tuple[Gate, ...]
    gate_set: Mapping[str, Any]
    made_at: str
    not_measured: tuple[str, ...] = ()
    policy_sha256: str = ""

    def sign(self, signer: Signer) -> dict[str, Any]:
        """The verdict as JSON with `key_id` and `signature` (Ed25519 over canonical JSON)."""
        return signer.sign(
            {
                "adapter_sha256": self.adapter_sha256,
                "parent_sha256": self.parent_sha256,
                "base_sha256": self.base_sha256,
                "outcome": self.outcome,
                "reasons": list(self.reasons),
                "gates": [gate.as_json() for gate in self.gates],
                "gate_set": dict(self.gate_set),
                "made_at": self.made_at,
                "not_measured": list(self.not_measured),
                "policy_sha256": self.policy_sha256,
            }
        )


@dataclass(frozen=True)
class Evaluation:
    """All that was found about one candidate.

    Attributes:
        reasons: sentences that explain the outcome, the most telling first.
        slices: all records first, then each domain in alphabetical order.
        not_measured: what this evaluation cannot say, and why.
        gate_set: {name, sha256, n, data}.
        private: noisy scores on the stream's own holdout; None where none were asked for.
        figures: every metric that was measured, of every model it was measured of, over all records and by domain.
        policy_sha256: of the gates that were asked.
        examples: records of the public gate set with what the models say to them; none where nobody asked for any.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    gates: tuple[Gate, ...]
    slices: tuple[Slice, ...]
    not_measured: tuple[str, ...]
    gate_set: Mapping[str, Any]
    facts: CandidateFacts
    private: PrivateScores | None = None
    figures: tuple[Figure, ...] = ()
    policy_sha256: str = ""
    examples: tuple[Example, ...] = ()

    def verdict(self, signer: Signer, made_at: str | None = None) -> dict[str, Any]:
        """The signed verdict. `made_at` is RFC 3339 in UTC, now when not given."""
        return Verdict(
            adapter_sha256=self.facts.adapter_sha256,
            parent_sha256=self.facts.parent_sha256,
            base_sha256=self.facts.base_sha256,
            outcome=self.outcome,
            reasons=self.reasons,
            gates=self.gates,
            gate_set=self.gate_set,
            made_at=made_at or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            not_measured=self.not_measured,
            policy_sha256=self.policy_sha256,
        ).sign(signer)

    def metrics(self) -> dict[str, float]:
        """Figures by name, for `metrics.json` and MLflow: finite floats only.

        `accuracy`, `macro_f1`, `base_accuracy`, `live_accuracy` … over all records, `accuracy.<domain>` … per domain,
        the same of every metric that was measured, and every gate's value as `gate.<name>`.
        """
        found: dict[str, float | None] = {}
        for figure in self.figures:
            name = ("" if figure.role == "candidate" else f"{figure.role}_") + figure.metric
            found[f"{name}{_suffix(figure.domain)}"] = figure.score.value
            found[f"{name}_se{_suffix(figure.domain)}"] = figure.score.se
        for part in self.slices:
            end = _suffix(part.domain)
            found[f"majority_accuracy{end}"] = part.majority
            for prefix, scores in (("", part.candidate), ("live_", part.live), ("base_", part.base)):
                if scores:
                    found[f"{prefix}accuracy{end}"] = scores.accuracy.value
                    found[f"{prefix}accuracy_se{end}"] = scores.accuracy.se
                    found[f"{prefix}macro_f1{end}"] = scores.macro_f1.value
        found |= {f"gate.{gate.name}": gate.value for gate in self.gates}
        found["share_used"] = self.facts.share_used
        if not self.facts.unprotected:
            found |= {"epsilon": self.facts.epsilon, "delta": self.facts.delta}
        return {name: value for name, value in found.items() if value is not None and abs(value) < float("inf")}


def _suffix(domain: str) -> str:
    """A domain at the end of a metric's name: MLflow takes letters, digits and these."""
    return "." + re.sub(r"[^\w./ -]", "_", domain, flags=re.ASCII) if domain else ""
