"""Several adapters in one pass: what each says is what it says alone, and what they share is run once."""

import math
from collections import Counter

import numpy as np
import pytest

from serving.errors import PromptTooLong, UnknownAdapter
from serving.inprocess import InProcessEngine
from serving.scoring import grow
from tests.serving.adapters import random_adapter

PROMPTS = [
    "where is my order",
    "hi",
    "My card was charged twice, and I would like to know why; can you look into that for me please?",
    "¿Dónde está 我的 订单 🙂?",
    "cancel it",
]
LABELS = ["order_status", "order_cancel", "order_cancel_all", "refund", "yes"]
NAMES = [None, "upper", "all", "stable"]
TOKENS = 12


@pytest.fixture(scope="module")
def alone(engine):
    """Each adapter's answers and whole scores, asked on its own."""
    return {
        name: (engine.generate(name, PROMPTS, TOKENS), engine.score_labels(name, PROMPTS, LABELS)) for name in NAMES
    }


def test_the_tree_joins_labels_that_begin_alike():
    tree = grow([[1, 2, 9], [1, 3, 9], [1, 9], [4, 9]])
    assert tree.tokens == (-1, 1, 2, 3, 4)
    assert tree.ancestors == ((), (1,), (1, 2), (1, 3), (4,))
    assert [[tuple(tree.edges[edge]) for edge in path if edge >= 0] for path in tree.paths] == [
        [(0, 1), (1, 2), (2, 9)],
        [(0, 1), (1, 3), (3, 9)],
        [(0, 1), (1, 9)],
        [(0, 4), (4, 9)],
    ]


@pytest.mark.parametrize("labels", [LABELS, []])
def test_answers_of_several_adapters_are_those_of_each_alone(engine, alone, labels):
    said = engine.ask(NAMES, PROMPTS, labels, max_tokens=TOKENS, within=-1)
    assert [one.answers for one in said] == [alone[name][0] for name in NAMES]


def test_what_labels_guess_does_not_change_an_answer(engine, alone):
    """Labels that are the very answers: the walk never leaves the tree, or leaves it at the last token."""
    labels = sorted({text for answers, _ in alone.values() for text in answers})
    said = engine.ask(NAMES, PROMPTS, labels, max_tokens=TOKENS, within=0.0)
    assert [one.answers for one in said] == [alone[name][0] for name in NAMES]


def test_only_those_that_are_asked_write(engine, alone):
    said = engine.ask(NAMES, PROMPTS, LABELS, max_tokens=[0, TOKENS, 0, 3])
    assert said[1].answers == alone["upper"][0]
    assert said[3].answers == engine.generate("stable", PROMPTS, 3)
    assert said[0].answers == said[2].answers == [None] * len(PROMPTS)


def test_scores_of_several_adapters_are_those_of_each_alone(engine, alone):
    for one, name in zip(engine.ask(NAMES, PROMPTS, LABELS), NAMES, strict=True):
        np.testing.assert_allclose(one.scores, alone[name][1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("within", [0.0, 1.0, 4.0])
def test_a_bound_is_never_below_the_likelihood_nor_near_the_likeliest(engine, alone, within):
    for one, name in zip(engine.ask(NAMES, PROMPTS, LABELS, within=within), NAMES, strict=True):
        whole = alone[name][1]
        assert (one.scores.argmax(axis=1) == whole.argmax(axis=1)).all()
        bounded = one.scores > whole + 1e-4
        assert (one.scores >= whole - 1e-4).all()
        assert (one.scores <= whole.max(axis=1, keepdims=True) - within + 1e-4)[bounded].all()


def test_a_narrow_margin_leaves_branches_out(engine, alone):
    found = engine.ask(["all"], PROMPTS, LABELS, within=0.0)[0].scores
    assert (found > alone["all"][1] + 1e-3).any(), "nothing was left out, so the tests of bounds tested nothing"


def test_layers_that_no_adapter_changes_are_run_once(tiny, adapters):
    with InProcessEngine(tiny) as fresh:
        for name in ("upper", "stable"):
            fresh.load(name, adapters[name])
        seen = Counter()
        layer = fresh._decoder._layer

        def counted(index, hidden, *rest):
            seen[index] += hidden.shape[0] * hidden.shape[1]
            return layer(index, hidden, *rest)

        fresh._decoder._layer = counted
        fresh.ask(["upper", "stable", None], PROMPTS, LABELS)
        lowest = min(fresh._residents[name].lowest for name in ("upper", "stable"))
        assert lowest > 0
        assert {seen[index] for index in range(lowest)} == {seen[0]}
        assert {seen[index] for index in range(lowest, fresh._decoder.depth)} == {3 * seen[0]}
        whole, seen_again = seen[0], Counter()
        seen.clear()
        fresh.ask(["upper", "stable", None], PROMPTS, LABELS, within=0.0)
        seen_again.update(seen)
        assert seen_again[0] < whole


def test_an_adapter_that_is_not_finite_disturbs_nobody(engine, alone, tiny, tmp_path):
    random_adapter(tiny, tmp_path / "wild", 4)
    engine.load("wild", tmp_path / "wild")
    for _, b in engine._residents["wild"].parts.values():
        b.fill_(float("inf"))
    wild, upper = engine.ask(["wild", "upper"], PROMPTS, LABELS, max_tokens=TOKENS)
    engine.unload("wild")
    assert np.isnan(wild.scores).all()
    assert wild.answers == [None] * len(PROMPTS)
    np.testing.assert_allclose(upper.scores, alone["upper"][1], atol=1e-4, rtol=0)
    assert upper.answers == alone["upper"][0]


def test_what_cannot_be_asked_is_refused(engine):
    with pytest.raises(UnknownAdapter, match="adapter=nobody"):
        engine.ask([None, "nobody"], PROMPTS, LABELS)
    with pytest.raises(PromptTooLong, match=r"\+ max_tokens=9000"):
        engine.ask([None], PROMPTS, max_tokens=9000)
    assert engine.ask([], PROMPTS) == []
    assert engine.ask([None], [], LABELS, within=math.inf)[0].scores.shape == (0, len(LABELS))
