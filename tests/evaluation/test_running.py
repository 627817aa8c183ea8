"""Calibration, perplexity, latency and size: by definition, on a real engine where one is needed."""

import numpy as np
import pytest

from evaluation.catalogue import find
from evaluation.gates import evaluate
from evaluation.measurement import Measurement
from evaluation.metrics import compare, score
from evaluation.scorer import Subject, Timed
from serving.inprocess import InProcessEngine
from serving.timing import timed
from tests.evaluation.planted import FACTS, Planted, asking, write_gate_set
from tests.serving.adapters import random_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl", per_domain=8)


class Unsure(Planted):
    """Says the same with log-likelihoods that are drawn."""

    def score_labels(self, _adapter, prompts, labels):
        return np.random.default_rng(5).normal(size=(len(prompts), len(labels))) * 2 - 30


def test_calibration_equals_its_definition_bin_by_bin(gate_set):
    subject = Subject("candidate", "candidate", Unsure(gate_set, {}), gate_set)
    one = find("calibration")(subject, {"bins": 10})
    scores = subject.likelihoods()
    likely = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    sure = likely.max(axis=1)
    labels = list(gate_set.labels)
    right = np.array([labels[row.argmax()] == r.truth for row, r in zip(likely, gate_set.records, strict=True)])
    gap = 0.0
    for low in np.arange(0, 1, 0.1):
        inside = (sure >= low) & (sure < low + 0.1)
        if inside.any():
            gap += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    assert score(one).value == pytest.approx(gap)
    assert "10 equal-width bins" in one.version


def test_a_calibrated_model_errs_less_than_an_overconfident_one(gate_set):
    statistic = find("calibration")(Subject("candidate", "c", Unsure(gate_set, {}), gate_set)).statistic
    sure = RNG.uniform(0.3, 1.0, 5000)
    right = RNG.random(5000) < sure
    honest = Measurement(np.stack([sure, right], axis=1).astype(float), statistic)
    boasting = Measurement(np.stack([np.minimum(1.0, sure + 0.2), right], axis=1).astype(float), statistic)
    assert score(honest).value < 0.03
    assert score(boasting).value > 0.1
    assert score(honest).se < 0.02


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "upper"
    random_adapter(tiny, folder, 1)
    with InProcessEngine(tiny, system="") as made:
        made.load("candidate", folder)
        yield made, folder


def test_perplexity_equals_one_record_after_the_other(engine, gate_set):
    made, _ = engine
    tokens = [len(made.text_ids(r.completion)) + 1 for r in gate_set.records]
    alone = [made.score_labels("candidate", [r.prompt], [r.completion])[0, 0] for r in gate_set.records]
    expected = np.exp(-np.sum(alone) / np.sum(tokens))
    subject = Subject("candidate", "candidate", made, gate_set)
    assert score(find("perplexity")(subject)).value == pytest.approx(expected, rel=1e-4)
    subject = Subject("candidate", "candidate", made, gate_set)
    assert subject.likelihoods().shape == (len(gate_set.records), len(gate_set.labels))
    assert score(find("perplexity")(subject)).value == pytest.approx(expected, rel=1e-4), "from scores that are there"
    base = Subject("base", None, made, gate_set)
    found = compare(find("perplexity")(subject), find("perplexity")(base), "lower")
    assert found.gain.value == pytest.approx(score(find("perplexity")(base)).value - expected, rel=1e-4)


def test_latency_is_taken_on_the_engine_that_serves(engine, gate_set):
    made, _ = engine
    subject = Subject(
        "candidate", "candidate", made, gate_set, timer=lambda adapter, asked, most: timed(made, adapter, asked, most)
    )
    options = {"samples": 6, "max_tokens": 4}
    middle, most = (score(find(name)(subject, options)) for name in ("latency_p50", "latency_p95"))
    assert 0 < middle.value <= most.value < 60
    rate = score(find("tokens_per_second")(subject, options))
    answers = subject.timed(gate_set.records[:1], 4)
    assert answers[0].text == made.generate("candidate", [gate_set.records[0].prompt], 4)[0]
    assert answers[0].tokens <= 4
    assert rate.value > 0


def test_quantiles_are_numpys_at_any_weights(gate_set):
    seconds = RNG.exponential(size=24)

    def timer(_adapter, prompts, _most):
        return [Timed("", value, 3) for value in seconds[: len(prompts)]]

    for share, name in ((0.5, "latency_p50"), (0.95, "latency_p95")):
        one = find(name)(Subject("candidate", "c", Planted(gate_set, {}), gate_set, timer=timer))
        n = one.n
        assert score(one).value == np.quantile(seconds[:n], share, method="inverted_cdf")
        drawn = RNG.integers(0, n, n)
        weights = np.bincount(drawn, minlength=n)[None, :].astype(float)
        expected = np.quantile(seconds[drawn], share, method="inverted_cdf")
        assert one.statistic(weights, one.rows)[0] == expected


def test_a_slower_candidate_is_found_by_the_same_prompts_paired(gate_set):
    def timer(adapter, prompts, _most):
        slow = {"candidate": 0.3, "live": 0.2}[adapter]
        return [Timed("", slow + 0.01 * (i % 7), 3) for i in range(len(prompts))]

    policy = asking({"metric": "latency_p95", "against": "live", "bound": 0.05, "samples_min": 20})
    scorer = Planted(gate_set, {"candidate": {"": 0.9}, "live": {"": 0.7}, None: {"": 0.2}})
    found = evaluate(gate_set, policy, scorer, candidate="candidate", live="live", facts=FACTS, timer=timer)
    assert found.outcome == "failed"
    assert "latency_p95 is worse than of live: all records 0.1 s higher" in found.reasons[0]


def test_the_size_of_an_adapter_is_that_of_its_files(engine, gate_set):
    made, folder = engine
    expected = sum(path.stat().st_size for path in folder.iterdir())
    policy = asking(
        {"metric": "adapter_bytes", "bound": expected - 1},
        {"metric": "accuracy", "bound": 0.0, "samples_min": 1},
    )
    found = evaluate(
        gate_set, policy, made, candidate="candidate", live=None, facts=FACTS, folders={"candidate": folder}
    )
    assert found.outcome == "failed"
    gate = next(gate for gate in found.gates if gate.name == "adapter_bytes")
    assert (gate.value, gate.se, gate.n) == (expected, None, 1)
