"""Private scores: what a candidate does on the stream's own holdout, told only as noisy counts, with their error.

Every unit of the holdout has one vote a release, spread over its records, each in one cell: (domain, who was right).
So one unit adds a vector of L1 norm one, hence of L2 norm at most one, to the sum that `privacy.counts` releases with
noise of standard deviation sigma on every cell. All figures below are made from that release alone.

With cells h, noisy, N their sum and A that of the cells in which the candidate is right, accuracy is p = A / N. By the
delta method (Casella and Berger 2002, section 5.5.4) its variance is

    p (1 - p) / N   +   sigma^2 (R (1 - p)^2 + W p^2) / N^2          R, W: how many cells are right, wrong

the first term for the choice of people, the second for the noise. With wins, losses and ties summing to N, the gain is
d = (wins - losses) / N, s = (wins + losses) / N, and its variance

    (s - d^2) / N   +   sigma^2 (C_w (1 - d)^2 + C_l (1 + d)^2 + C_t d^2) / N^2      C: how many cells of each kind

N is the noisy sum, not a public nominal size: how many records were rejected is private and unknown, and it would bias
the ratio by as much. A slice whose N is not well above its own noise is not judged (`NOISE_RATIO_MIN`).

A vote is in [0, 1], so where a user has several records the first terms are upper bounds (a variable in [0, 1] of mean
p has variance at most p (1 - p)).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from evaluation.metrics import Score, holm
from evaluation.verdict import Gate, Outcome
from privacy.canonical import sha256_of
from privacy.counts import CountsMechanism

if TYPE_CHECKING:
    from evaluation.policy import GatePolicy, Rule
    from evaluation.scorer import Scorer
    from privacy.ledger import Charge
    from privacy.randomness import KeyedStream

ACCURACY_VERSION = "noisy-accuracy/1 summed-loglik one-vote-a-unit"
FORGETTING_VERSION = "noisy-gain/1 summed-loglik one-vote-a-unit one-sided holm"
GAIN_VERSION = "noisy-gain/1 summed-loglik one-vote-a-unit two-sided"
_VERSIONS = {"reach": ACCURACY_VERSION, "hold": FORGETTING_VERSION, "beat": GAIN_VERSION}

# Who was right about a record. Without a live version only the candidate's answer counts.
PAIRED = ("both", "candidate", "live", "neither")
ALONE = ("candidate", "neither")
# N must be this many standard deviations of its own noise: then it is known to a tenth, and what the delta method
# leaves out (the square of that, a hundredth of the value) is small beside the standard error.
NOISE_RATIO_MIN = 10.0
# Agresti and Coull (1998): two successes and two failures more, so that a share of 0 or 1 is not taken for certain.
_PRIOR = 2.0
_NORMAL = NormalDist()
ALL = ""


@dataclass(frozen=True)
class Marked:
    """One holdout record and who was right about it. Private: it never leaves the process."""

    unit: str
    domain: str
    candidate: bool
    live: bool | None


@dataclass(frozen=True)
class NoisyCounts:
    """A release: the only thing about the holdout that leaves the process.

    Attributes:
        domains: declared domains, in the order of the counts.
        cells: who was right, in the order of the counts within a domain.
        values: domains times cells, votes; any of them may be negative.
        sigma: standard deviation of the noise on each, votes.
        unit: record or user: whose votes they are.
    """

    domains: tuple[str, ...]
    cells: tuple[str, ...]
    values: tuple[float, ...]
    sigma: float
    unit: Literal["record", "user"]

    def as_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """The counts as they were kept.

        Raises:
            ValueError: there are not domains times cells of them.
        """
        counts = cls(tuple(kept["domains"]), tuple(kept["cells"]), tuple(kept["values"]), kept["sigma"], kept["unit"])
        if len(counts.values) != len(counts.domains) * len(counts.cells):
            raise ValueError(f"counts={len(counts.values)}: must be {len(counts.domains)} x {len(counts.cells)}")
        return counts


@dataclass(frozen=True)
class PrivatePlan:
    """One private evaluation, as it is charged and as it runs. Public: nothing in it depends on a record.

    Attributes:
        evaluation_id: the ledger's name of it, and the gates' `charge_id`.
        live_sha256: what the candidate is compared with; None: nothing is live.
        blocks: whose holdouts are read and charged.
        sigma: standard deviation of the noise on each count, votes.
        domains: declared domains; one that is not among them is not counted.
        answers_sha256: of the declared labels and how each is said.
        code_sha256: of the code that planned it.
        noise_source: system, or test: known to whoever knows the seed, hence no privacy.
    """

    evaluation_id: str
    attempt: int
    stream: str
    candidate_sha256: str
    live_sha256: str | None
    base_sha256: str
    data_revision: str
    unit: Literal["record", "user"]
    blocks: tuple[str, ...]
    sigma: float
    domains: tuple[str, ...]
    answers_sha256: str
    code_sha256: str
    noise_source: Literal["system", "test"] = "system"

    @property
    def plan_hash(self) -> str:
        """sha256 over the canonical JSON of everything above."""
        return sha256_of(self.as_json())

    @property
    def paired(self) -> bool:
        """Whether the candidate is compared with a live version."""
        return self.live_sha256 is not None

    def as_json(self) -> dict[str, Any]:
        """JSON form; `from_json` reads it back."""
        return {**asdict(self), "blocks": list(self.blocks), "domains": list(self.domains)}

    @classmethod
    def from_json(cls, kept: Mapping[str, Any]) -> Self:
        """The plan as it was kept."""
        return cls(**{**kept, "blocks": tuple(kept["blocks"]), "domains": tuple(kept["domains"])})

    @property
    def _mechanism(self) -> CountsMechanism:
        return CountsMechanism(len(self.domains) * len(cells_of(paired=self.paired)), self.sigma)

    def charges(self) -> tuple[Charge, ...]:
        """What each block's holdout pays: the mechanism that `release` runs."""
        return self._mechanism.charges(self.blocks)

    def release(self, marked: Iterable[Marked], noise: KeyedStream) -> NoisyCounts:
        """The noisy counts: the only thing that may leave.

        Args:
            marked: every holdout record of the plan's blocks, each (user_id, event_id) once.
            noise: keyed to this plan alone.
        """
        units = votes(marked, self.domains, paired=self.paired)
        values = self._mechanism.release(units, noise)
        return NoisyCounts(self.domains, cells_of(paired=self.paired), tuple(values.tolist()), self.sigma, self.unit)


@dataclass(frozen=True)
class PrivateSlice:
    """A domain, or all together (domain ""), from noisy counts.

    Attributes:
        n: noisy number of votes, rounded.
        noise: standard deviation of n.
        visible: whether n is far enough above its noise to be judged.
        candidate, live: accuracy; None where the slice is not visible, or nothing is live.
        gain: of accuracy, candidate less live, paired.
    """

    domain: str
    n: int
    noise: float
    visible: bool
    candidate: Score | None = None
    live: Score | None = None
    gain: Score | None = None


@dataclass(frozen=True)
class PrivateScores:
    """What a private evaluation came to.

    Attributes:
        counts: the release; None when there is none.
        refusal: why there is none, for a person.
        charge_id: the ledger's name of the evaluation; None when nothing was charged.
        blocks: whose holdouts were read and charged.
        evaluations_left: how many more of this noise the account can pay.
    """

    counts: NoisyCounts | None
    refusal: str = ""
    charge_id: str | None = None
    blocks: tuple[str, ...] = ()
    evaluations_left: int = 0


def cells_of(*, paired: bool) -> tuple[str, ...]:
    """The cells of one domain."""
    return PAIRED if paired else ALONE


def votes(marked: Iterable[Marked], domains: Sequence[str], *, paired: bool) -> Iterator[dict[int, float]]:
    """One mapping a unit: positions of `NoisyCounts.values` to shares of the unit's one vote.

    Records of a domain that is not declared have no cell, and take no part in their unit's vote.
    """
    cells, place = cells_of(paired=paired), {domain: index for index, domain in enumerate(domains)}
    by_unit: dict[str, list[int]] = defaultdict(list)
    for record in marked:
        if record.domain in place:
            by_unit[record.unit].append(place[record.domain] * len(cells) + cells.index(_cell(record, paired=paired)))
    for positions in by_unit.values():
        vote: dict[int, float] = defaultdict(float)
        for position in positions:
            vote[position] += 1.0 / len(positions)
        yield dict(vote)


def _cell(record: Marked, *, paired: bool) -> str:
    if paired and record.live:
        return "both" if record.candidate else "live"
    return "candidate" if record.candidate else "neither"


def right(
    scorer: Scorer, adapter: str | None, asked: Sequence[tuple[str, str]], answers: Mapping[str, str]
) -> list[bool]:
    """Whether a model's likeliest label is the true one, record by record.

    Args:
        scorer: the engine.
        adapter: name of the adapter; None is the base.
        asked: (prompt, true label) of each record.
        answers: for every declared label the completion that says it, public. A record with another label is never
            answered rightly, nor is one whose scores are not finite, nor one at which the engine throws: each depends
            on that record alone. What an engine says of a record when it throws is dropped: it may hold content.
    """
    if not asked:
        return []
    prompts, said = [prompt for prompt, _ in asked], list(answers.values())
    try:
        scores = np.asarray(scorer.score_labels(adapter, prompts, said), dtype=float)
    except Exception:  # noqa: BLE001 - one record that an engine cannot read must not decide about the others
        if len(asked) == 1:
            return [False]
        return [flag for one in asked for flag in right(scorer, adapter, [one], answers)]
    labels = list(answers)
    finite = np.atleast_1d(np.isfinite(scores).all(axis=1))
    return [
        bool(sound) and labels[int(row.argmax())] == truth
        for row, sound, (_, truth) in zip(scores, finite, asked, strict=True)
    ]


def slices_of(counts: NoisyCounts, samples_min: int, samples_per_domain_min: int) -> tuple[PrivateSlice, ...]:
    """All together first, then each domain as declared."""
    table = np.asarray(counts.values).reshape(len(counts.domains), len(counts.cells))
    whole = _slice(ALL, table.sum(axis=0), counts, len(counts.domains), samples_min)
    parts = (
        _slice(domain, row, counts, 1, samples_per_domain_min)
        for domain, row in zip(counts.domains, table, strict=True)
    )
    return (whole, *parts)


def _slice(domain: str, sums: Any, counts: NoisyCounts, domains: int, samples_min: int) -> PrivateSlice:
    """One slice; `sums` (cells,) each over `domains` noisy counts."""
    total, noise = float(sums.sum()), counts.sigma * math.sqrt(domains * len(counts.cells))
    visible = total >= max(float(samples_min), NOISE_RATIO_MIN * noise)
    if not visible:
        return PrivateSlice(domain, max(round(total), 0), noise, visible)
    of = dict(zip(counts.cells, (float(value) for value in sums), strict=True))
    paired = counts.cells == PAIRED
    spread = counts.sigma * math.sqrt(domains)  # of one cell's sum
    return PrivateSlice(
        domain,
        round(total),
        noise,
        visible,
        candidate=_accuracy(of, ("both", "candidate"), total, spread),
        live=_accuracy(of, ("both", "live"), total, spread) if paired else None,
        gain=_gain(of, total, spread) if paired else None,
    )


def _accuracy(of: Mapping[str, float], correct: Sequence[str], total: float, spread: float) -> Score:
    rights = [value for cell, value in of.items() if cell in correct]
    value = sum(rights) / total
    share = (min(max(sum(rights), 0.0), total) + _PRIOR) / (total + 2 * _PRIOR)
    noise = spread**2 * (len(rights) * (1 - value) ** 2 + (len(of) - len(rights)) * value**2) / total**2
    return Score(value, math.sqrt(share * (1 - share) / total + noise), round(total))


def _gain(of: Mapping[str, float], total: float, spread: float) -> Score:
    wins, losses = of["candidate"], of["live"]
    value = (wins - losses) / total
    differ = (min(max(wins + losses, 0.0), total) + _PRIOR) / (total + 2 * _PRIOR)
    noise = spread**2 * ((1 - value) ** 2 + (1 + value) ** 2 + 2 * value**2) / total**2
    return Score(value, math.sqrt(max(differ - value**2, differ / total) / total + noise), round(total))


def gates_of(scores: PrivateScores, rules: Sequence[Rule], policy: GatePolicy) -> tuple[Gate, ...]:
    """The private gates.

    Args:
        scores: what the evaluation came to.
        rules: the policy's private ones; those against live only where something is live.
        policy: whose the least numbers of samples are.
    """
    if scores.counts is None:
        return tuple(
            Gate(
                rule.title,
                _VERSIONS[rule.asks],
                "undecided",
                scores.refusal,
                "",
                hard=rule.hard,
                data="private",
                charge_id=scores.charge_id,
            )
            for rule in rules
        )
    slices = slices_of(scores.counts, policy.samples_min, policy.samples_per_domain_min)
    judge = {"reach": _floor, "hold": _forgetting, "beat": _better}
    return tuple(judge[rule.asks](slices, rule, scores) for rule in rules)


def _gate(
    rule: Rule,
    outcome: Outcome,
    sentence: str,
    bound: str,
    score: Score | None,
    scores: PrivateScores,
    *,
    p: float | None = None,
    points: float = 1.0,
) -> Gate:
    value, se, n = (points * score.value + 0.0, abs(points) * score.se, score.n) if score else (None, None, None)
    version = _VERSIONS[rule.asks]
    return Gate(rule.title, version, outcome, sentence, bound, value, se, n, p, rule.hard, "private", scores.charge_id)


def _floor(slices: Sequence[PrivateSlice], rule: Rule, scores: PrivateScores) -> Gate:
    whole, least, chance = slices[0], rule.limit, rule.chance or 0.0
    bound = f">= {least:.3f} beyond chance, p <= {chance:g}"
    score = whole.candidate
    if score is None:
        sentence = f"accuracy on the holdout cannot be decided: {_hidden(whole)}"
        return _gate(rule, "undecided", sentence, bound, None, scores)
    # Where no floor is asked for, every accuracy is above it.
    above = _NORMAL.cdf((least - score.value) / score.se) if least else 0.0
    outcome: Outcome = "passed" if above <= chance else "failed" if above >= 1 - chance else "undecided"
    sentence = f"accuracy on the holdout is {score.value:.3f} ± {score.se:.3f} on about {score.n} {_votes(scores)}"
    if outcome == "failed":
        sentence += f", must be {bound}"
    elif outcome == "undecided":
        sentence += f", which is neither surely above nor surely below {least:.3f}"
    return _gate(rule, outcome, sentence, bound, score, scores)


def _forgetting(slices: Sequence[PrivateSlice], rule: Rule, scores: PrivateScores) -> Gate:
    """No visible slice may be worse than live by more than the allowed loss and beyond chance.

    A domain that the noise hides is told and decides nothing: how many records it has is not in anybody's hands, and
    the public gate set decides on every domain.
    """
    chance = rule.chance or 0.0
    bound = f"drop <= {100 * rule.limit:g} points, or p > {chance:g} after Holm"
    seen = [(part, part.gain) for part in slices if part.gain is not None]
    hidden = [part for part in slices if not part.visible]
    if slices[0].gain is None:
        sentence = f"forgetting on the holdout cannot be decided: {_hidden(slices[0])}"
        return _gate(rule, "undecided", sentence, bound, None, scores)
    worse = holm([_NORMAL.cdf(gain.value / gain.se) for _, gain in seen])
    found = [(part, gain, p) for (part, gain), p in zip(seen, worse, strict=True)]
    lost = [one for one in found if one[2] <= chance and -one[1].value > rule.limit]
    part, gain, p = min(lost or found, key=lambda one: one[1].value)
    if lost:
        names = ", ".join(f"{_name(a)} {100 * b.value:+.1f} ± {100 * b.se:.1f} points (p {c:.3f})" for a, b, c in lost)
        sentence = f"it forgets against live on the holdout: {names}"
    else:
        sentence = (
            f"nothing is seen to be forgotten on the holdout "
            f"(lowest: {_name(part)} {100 * gain.value:+.1f} ± {100 * gain.se:.1f} points)"
        )
    if hidden:
        sentence += f"; hidden by the noise: {', '.join(_name(one) for one in hidden)}"
    return _gate(rule, "failed" if lost else "passed", sentence, bound, gain, scores, p=p, points=-100.0)


def _better(slices: Sequence[PrivateSlice], rule: Rule, scores: PrivateScores) -> Gate:
    whole, chance = slices[0], rule.chance or 0.0
    bound = f"gain > {100 * rule.limit:g} points, p <= {chance:g}"
    gain = whole.gain
    if gain is None:
        sentence = f"the gain on the holdout is unknown: {_hidden(whole)}"
        return _gate(rule, "undecided", sentence, bound, None, scores)
    p = 2 * _NORMAL.cdf(-abs(gain.value) / gain.se)
    outcome: Outcome = "passed" if gain.value > rule.limit and p <= chance else "failed"
    sentence = f"{100 * gain.value:+.1f} ± {100 * gain.se:.1f} points against live on about {gain.n} {_votes(scores)}"
    return _gate(rule, outcome, sentence, bound, gain, scores, p=p, points=100.0)


def _votes(scores: PrivateScores) -> str:
    return f"{scores.counts.unit}s" if scores.counts else ""


def _hidden(part: PrivateSlice) -> str:
    return (
        f"{_name(part)}: about {part.n} votes, noise ± {part.noise:.0f}; must be at least {NOISE_RATIO_MIN:g} times "
        f"the noise and the gates' least number of samples; hold out more, or ask for fewer evaluations"
    )


def _name(part: PrivateSlice) -> str:
    return part.domain or "all together"


def not_measured(scores: PrivateScores, policy: GatePolicy) -> tuple[str, ...]:
    """What a reader might believe the private scores say, and they do not."""
    why = (
        "it needs a count for each label, most of them smaller than the noise, and one record may move it by 1 / labels"
    )
    said = [f"macro-F1 on the holdout: {why}; it is not released"]
    if scores.counts is not None:
        hidden = [
            part
            for part in slices_of(scores.counts, policy.samples_min, policy.samples_per_domain_min)
            if not part.visible
        ]
        said += [f"the holdout of {_name(part)}: about {part.n} votes, noise ± {part.noise:.0f}" for part in hidden]
    return tuple(said)
