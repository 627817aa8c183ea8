"""Metrics ask one model at a time; the engine is asked once, and what it said is kept."""

import numpy as np
import pytest

from evaluation.cache import Cache
from evaluation.errors import EvaluationError
from evaluation.gates import evaluate
from evaluation.policy import GatePolicy, Rule
from evaluation.scorer import predict
from evaluation.together import Together
from serving.errors import UnknownAdapter
from serving.inprocess import InProcessEngine
from tests.evaluation.planted import FACTS, write_gate_set
from tests.serving.adapters import random_adapter

NAMES = ("candidate", "live", None)
SHA = {"candidate": "c" * 64, "live": "d" * 64, None: "e" * 64}
POLICY = GatePolicy(
    rules=(
        Rule(metric="accuracy", bound=0.0),
        Rule(metric="accuracy", against="base", hard=False),
        Rule(metric="accuracy", slice="domain", against="live"),
        Rule(name="some", metric="exact_match", hard=False, options={"samples": 5}),
        Rule(metric="exact_match", against="live"),
    ),
    samples_min=4,
    samples_per_domain_min=2,
)


class Counting:
    """An engine, and what it was asked."""

    def __init__(self, engine):
        self.engine = engine
        self.asked = []

    def ask(self, adapters, prompts, labels=(), **how):
        self.asked.append((tuple(adapters), len(prompts)))
        return self.engine.ask(adapters, prompts, labels, **how)

    def text_ids(self, text):
        return self.engine.text_ids(text)


@pytest.fixture(scope="module")
def engine(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with InProcessEngine(tiny, system="") as made:
        for seed, name in enumerate(NAMES[:2]):
            random_adapter(tiny, folder / name, seed)
            made.load(name, folder / name)
        yield made


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl", per_domain=4)


def judged(scorer, gate_set):
    return evaluate(gate_set, POLICY, scorer, candidate="candidate", live="live", facts=FACTS, everything=True)


def together(engine, cache=None, **more):
    more = {"scored": NAMES, "writers": NAMES[:2], "answer_tokens": 11} | more
    return Together(engine, SHA, cache=cache, **more)


def test_an_evaluation_finds_the_same_as_model_by_model_and_asks_once(engine, gate_set):
    counting = Counting(engine)
    one = judged(together(counting), gate_set)
    other = judged(engine, gate_set)
    assert one == other
    assert counting.asked == [(NAMES, len(gate_set.records))]


def test_the_second_evaluation_asks_nobody_and_finds_the_same(engine, gate_set, tmp_path):
    first = judged(together(engine, Cache(tmp_path)), gate_set)
    counting = Counting(engine)
    assert judged(together(counting, Cache(tmp_path)), gate_set) == first
    assert counting.asked == []


def test_a_new_candidate_is_asked_alone(engine, gate_set, tmp_path):
    judged(together(engine, Cache(tmp_path)), gate_set)
    counting = Counting(engine)
    asked = together(counting, Cache(tmp_path))
    asked.sha256 = {**SHA, "candidate": "f" * 64}
    judged(asked, gate_set)
    assert counting.asked == [(("candidate",), len(gate_set.records))]


@pytest.mark.parametrize("what", ["about", "sha256"])
def test_another_base_prompt_or_code_is_asked_anew(engine, gate_set, tmp_path, what):
    judged(together(engine, Cache(tmp_path), about={"system": "a"}), gate_set)
    counting = Counting(engine)
    asked = together(counting, Cache(tmp_path), about={"system": "b" if what == "about" else "a"})
    if what == "sha256":
        asked.sha256 = {name: sha[::-1].replace(sha[0], "0") for name, sha in SHA.items()}
    judged(asked, gate_set)
    assert counting.asked


def test_a_damaged_entry_is_asked_again_and_mended(engine, gate_set, tmp_path):
    first = judged(together(engine, Cache(tmp_path)), gate_set)
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-7])
    counting = Counting(engine)
    assert judged(together(counting, Cache(tmp_path)), gate_set) == first
    assert counting.asked
    counting.asked.clear()
    judged(together(counting, Cache(tmp_path)), gate_set)
    assert not counting.asked


def test_whole_scores_are_used_for_choices_but_bounds_never_for_scores(engine, gate_set):
    prompts = [record.prompt for record in gate_set.records]
    labels = list(gate_set.answers.values())
    counting = Counting(engine)
    asked = together(counting)
    near = asked.choose("live", prompts, labels)
    whole = asked.score_labels("live", prompts, labels)
    assert len(counting.asked) == 2
    assert (whole <= near + 1e-4).all()
    assert asked.choose("candidate", prompts, labels).shape == whole.shape
    assert len(counting.asked) == 2
    np.testing.assert_allclose(whole, engine.score_labels("live", prompts, labels), atol=1e-4)


def test_one_model_that_cannot_be_asked_leaves_the_others_alone(engine, gate_set):
    asked = together(engine, scored=(*NAMES, "gone"), writers=("live", "gone"))
    asked.sha256 = {**SHA, "gone": "0" * 64}
    assert predict(asked, "live", gate_set).predicted is not None
    assert "not resident" in predict(asked, "gone", gate_set).problem
    with pytest.raises(UnknownAdapter):
        asked.generate("gone", ["hi"], 4)
    assert asked.generate("live", ["hi"], 4) == engine.generate("live", ["hi"], 4)


def test_a_broken_model_is_said_to_be_broken_and_not_kept(engine, gate_set, tiny, tmp_path):
    random_adapter(tiny, tmp_path / "wild", 7)
    engine.load("wild", tmp_path / "wild")
    for _, b in engine._residents["wild"].parts.values():
        b.fill_(float("inf"))
    asked = together(engine, Cache(tmp_path / "kept"), scored=("wild",), writers=("wild",))
    asked.sha256 = {**SHA, "wild": "0" * 64}
    assert predict(asked, "wild", gate_set).broken
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        asked.generate("wild", ["hi"], 4)
    engine.unload("wild")
    assert not (tmp_path / "kept").exists()
