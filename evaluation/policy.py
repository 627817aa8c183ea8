"""The gate policy of a stream: a list of gates, each a metric, what it must show, and how often chance may decide.

Three things can be asked. To `reach` a bound. To `beat` another model: gain more than the bound, beyond chance. To
`hold` what another model can: lose no more than the bound, or no more than chance explains.

What chance may do is stated before anything is measured, and kept (tests/evaluation/test_null.py resamples it):

    beat   a candidate that is no better passes at most p_max / 2 of the time (the test is two-sided)
    hold   a candidate that is no worse anywhere is stopped at most p_max of the time, all slices of the gate together
    reach  with p_max: a candidate under the bound passes, and one over it is stopped, at most p_max of the time each;
           between the two it is undecided. Without p_max the value decides as it is: half the time, at the bound
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privacy.canonical import sha256_of

Must = Literal["reach", "beat", "hold"]
Against = Literal["absolute", "live", "base"]
Slicing = Literal["whole", "domain", "label"]

_MUST: Mapping[Against, Must] = {"absolute": "reach", "live": "hold", "base": "beat"}
_P_MAX: Mapping[Must, float] = {"beat": 0.01, "hold": 0.05}
# A noisy count is never certain, so a private floor always allows for chance.
_PRIVATE_REACH_P_MAX = 0.05


class Rule(BaseModel):
    """One gate of a policy.

    Attributes:
        name: what the gate is called; empty: made of the rest.
        metric: a name of the catalogue, or `module:function`.
        slice: all records; or all records and every domain, or every true label, each on its own.
        against: an absolute bound, or what live or the bare base does on the same records.
        must: empty: reach an absolute bound, hold against live, beat the base.
        bound: in the metric's own unit, shares from 0 to 1: what must be reached, the gain that is needed, the loss
            that is allowed; none with `reach`: the value is shown and nothing decided.
        hard: whether it decides; else it is shown.
        p_max: how often chance may decide; see above.
        samples_min: fewer records: undecided; none: the stream's.
        data: the public gate set, or the stream's own holdout through noisy counts that its account pays for.
        options: of the metric.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: Annotated[str, Field(min_length=1, max_length=200)]
    slice: Slicing = "whole"
    against: Against = "absolute"
    must: Must | None = None
    bound: Annotated[float, Field(allow_inf_nan=False)] | None = None
    hard: bool = True
    p_max: Annotated[float, Field(gt=0, lt=1)] | None = None
    samples_min: Annotated[int, Field(ge=1)] | None = None
    data: Literal["public", "private"] = "public"
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,60}$")] | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if (self.asks == "reach") != (self.against == "absolute"):
            raise ValueError(f"must={self.asks} against={self.against}: reach goes with absolute, beat and hold do not")
        if self.bound is None and self.asks == "reach" and self.hard:
            raise ValueError("a hard gate needs a bound; give one, or set hard: false to have the value shown")
        if self.asks != "reach" and (self.bound or 0.0) < 0:
            raise ValueError(f"bound={self.bound}: must be >= 0: a gain that is needed, or a loss that is allowed")
        if self.data == "private":
            self._is_countable()
        return self

    def _is_countable(self) -> None:
        """Noisy counts of who was right are all that leaves the holdout."""
        if self.metric != "accuracy" or self.against == "base" or self.options:
            raise ValueError("data=private: the holdout tells accuracy alone, absolute or against live, no options")
        if self.slice != ("domain" if self.asks == "hold" else "whole"):
            raise ValueError("data=private: hold is judged by domain, reach and beat on the whole; set slice")
        if self.bound is None and self.asks == "reach":
            raise ValueError("data=private: what is paid for must be judged; give a bound")

    @property
    def asks(self) -> Must:
        """What the candidate must do."""
        return self.must or _MUST[self.against]

    @property
    def shown_only(self) -> bool:
        """Whether there is nothing to decide."""
        return self.bound is None and self.asks == "reach"

    @property
    def limit(self) -> float:
        """The bound, nought where none is given."""
        return self.bound or 0.0

    @property
    def chance(self) -> float | None:
        """How often chance may decide; None where the value decides as it is."""
        if self.p_max is not None:
            return self.p_max
        if self.asks == "reach":
            return _PRIVATE_REACH_P_MAX if self.data == "private" else None
        return _P_MAX[self.asks]

    @property
    def title(self) -> str:
        """What the gate is called."""
        if self.name:
            return self.name
        metric = self.metric.rpartition(":")[2].lower()
        verb = {"reach": "", "beat": f"_beats_{self.against}", "hold": f"_holds_{self.against}"}[self.asks]
        by = "" if self.slice == "whole" else f"_by_{self.slice}"
        return ("private_" if self.data == "private" else "") + metric + verb + by


DEFAULT: tuple[Rule, ...] = (
    Rule(metric="accuracy", bound=0.0),
    Rule(name="better_than_base", metric="accuracy", against="base", must="beat", p_max=0.01),
    Rule(name="forgetting", metric="accuracy", slice="domain", against="live", must="hold", bound=0.03, p_max=0.05),
    Rule(name="better_than_live", metric="accuracy", against="live", must="beat", p_max=0.01, hard=False),
    Rule(metric="macro_f1", hard=False),
    Rule(name="format", metric="exact_match", hard=False, samples_min=1, options={"samples": 32}),
)


@dataclass(frozen=True)
class GatePolicy:
    """What a candidate must show.

    Attributes:
        rules: the gates.
        samples_min: records a gate set needs before its overall figures decide anything.
        samples_per_domain_min: records a domain, or a label, needs before anything is decided in it.
    """

    rules: tuple[Rule, ...] = DEFAULT
    samples_min: int = 100
    samples_per_domain_min: int = 20

    def samples_of(self, rule: Rule, group: str) -> int:
        """The least records of a slice of a rule; the slice of all records is named ""."""
        if rule.samples_min is not None:
            return rule.samples_min
        return self.samples_per_domain_min if group else self.samples_min

    @property
    def sha256(self) -> str:
        """Of all that decides: two verdicts were asked the same when it is the same."""
        rules = [rule.model_dump(mode="json") for rule in self.rules]
        return sha256_of(
            {
                "rules": rules,
                "samples_min": self.samples_min,
                "samples_per_domain_min": self.samples_per_domain_min,
            }
        )

    def of(self, data: Literal["public", "private"]) -> tuple[Rule, ...]:
        """The rules on public, or on private data."""
        return tuple(rule for rule in self.rules if rule.data == data)

    def stops_equal_at_most(self) -> float:
        """How often, at most, a candidate that is no worse anywhere is stopped by the gates that ask to hold.

        Their rates added up, which holds whatever depends on what (Boole's inequality). A gate that asks to beat
        stops such a candidate on purpose, and is not counted.
        """
        rates = (rule.chance or 0.0 for rule in self.rules if rule.hard and rule.asks == "hold")
        return min(1.0, sum(rates))

    def promotes_no_better_at_most(self) -> float | None:
        """How often, at most, a candidate no better than live passes; None: this policy asks for no gain over live."""
        rates = [
            (rule.chance or 0.0) / 2
            for rule in self.rules
            if rule.hard and rule.asks == "beat" and rule.against == "live"
        ]
        return min(rates) if rates else None
