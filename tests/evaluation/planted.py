"""Planted models: what each says about every record is decided here, so the right verdict is known."""

import json
from pathlib import Path

import numpy as np

from evaluation.gates import CandidateFacts
from evaluation.gateset import GateSet
from evaluation.policy import GatePolicy, Rule

DOMAINS = ("account", "billing", "delivery")
LABELS = tuple(f"{domain} {i}" for domain in DOMAINS for i in range(3))
FACTS = CandidateFacts(
    adapter_sha256="a" * 64,
    parent_sha256="b" * 64,
    base_sha256="c" * 64,
    max_abs_delta=0.01,
    budget_kept=True,
    share_used=0.3,
    epsilon=8.0,
    delta=1e-5,
    unit="record",
    private=True,
)


def asking(*rules, **changes):
    """A policy of these rules alone."""
    return GatePolicy(tuple(Rule(**rule) for rule in rules), **changes)


def changed(policy, title, **changes):
    """The policy with one rule changed."""
    return GatePolicy(
        tuple(Rule(**{**r.model_dump(), **changes}) if r.title == title else r for r in policy.rules),
        policy.samples_min,
        policy.samples_per_domain_min,
    )


def without(policy, title):
    """The policy without one rule."""
    return GatePolicy(
        tuple(rule for rule in policy.rules if rule.title != title), policy.samples_min, policy.samples_per_domain_min
    )


def write_gate_set(path: Path, per_domain: int = 100) -> GateSet:
    lines = []
    for domain in DOMAINS:
        for i in range(per_domain):
            label = f"{domain} {i % 3}"
            record = {"event_id": f"{domain}-{i}", "domain": domain, "prompt": f"{domain} {i}", "completion": label}
            lines.append(json.dumps(record | {"label": label}))
    path.write_text("\n".join(lines) + "\n")
    return GateSet.load(path)


class Planted:
    """A scorer whose models are right on a given share of each domain, on records chosen by a fixed seed."""

    def __init__(self, gate_set: GateSet, skills: dict[str | None, dict[str, float]]) -> None:
        self.records = {record.prompt: record for record in gate_set.records}
        self.skills = skills
        draws = np.random.default_rng(5).permutation(len(self.records)) / len(self.records)
        self.draw = dict(zip(self.records, draws, strict=True))

    def is_right(self, adapter: str | None, prompt: str) -> bool:
        skill = self.skills[adapter]
        return self.draw[prompt] < skill.get(self.records[prompt].domain, skill[""])

    def score_labels(self, adapter, prompts, labels):
        scores = np.full((len(prompts), len(labels)), -9.0)
        for row, prompt in enumerate(prompts):
            column = labels.index(self.records[prompt].completion)
            scores[row, column if self.is_right(adapter, prompt) else (column + 1) % len(labels)] = -1.0
        return scores

    def generate(self, adapter, prompts, _max_tokens):
        return [f" {self.records[p].completion}\n" if self.is_right(adapter, p) else "?" for p in prompts]
