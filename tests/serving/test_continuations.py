"""Likelihoods of any continuation against transformers and peft, one row at a time."""

import numpy as np
import pytest
import torch

from serving.errors import PromptTooLong, UnknownAdapter
from serving.inprocess import InProcessEngine

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = [None, "upper", "all", "stable", "patterns", "head", "narrow"]


def one_by_one(model, rows):
    likelihoods, greedy = [], []
    for context, continuation in rows:
        ids = [*context, *continuation]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0, len(context) - 1 :].double()
        at = torch.arange(len(continuation))
        likelihoods.append(float(logits.log_softmax(dim=-1)[at, list(continuation)].sum()))
        greedy.append(logits.argmax(dim=-1).tolist() == list(continuation))
    return likelihoods, greedy


def random_rows(seed, count, *, beginning=0, longest=60):
    """Rows of any lengths; some share all but the last token, some are equal, all begin with the same ids."""
    rng = np.random.default_rng(seed)
    first = rng.integers(1000, size=beginning).tolist()
    rows = []
    while len(rows) < count:
        context = first + rng.integers(1000, size=rng.integers(1, longest)).tolist()
        continuation = rng.integers(1000, size=rng.integers(1, 6)).tolist()
        rows.append((context, continuation))
        rows += [(context, [*continuation[:-1], token]) for token in rng.integers(1000, size=rng.integers(3)).tolist()]
    return rows[:count]


@pytest.mark.parametrize("beginning", [0, 40])
def test_likelihoods_equal_one_by_one(engine, oracle, beginning):
    rows = random_rows(beginning, 18, beginning=beginning, longest=40)
    likelihoods, greedy = engine.score_tokens(NAMES, rows)
    for at, name in enumerate(NAMES):
        expected, said = one_by_one(oracle[name], rows)
        np.testing.assert_allclose(likelihoods[at], expected, atol=1e-4, rtol=0)
        assert greedy[at].tolist() == said
    assert likelihoods.dtype == np.float64


def test_what_greedy_decoding_says_is_known_to_be_greedy(engine, oracle):
    context, said = [5, 6, 7], []
    for _ in range(4):
        with torch.inference_mode():
            said.append(int(oracle["all"](input_ids=torch.tensor([context + said])).logits[0, -1].argmax()))
    rows = [(context, said), (context, [*said[:3], 1]), (context, [1, *said[1:]])]
    _, greedy = engine.score_tokens(["all"], rows)
    assert greedy.tolist() == [[True, False, False]]


def test_company_changes_nothing(engine):
    rows = random_rows(3, 16, beginning=10)
    together, _ = engine.score_tokens(NAMES, rows)
    alone = np.concatenate([engine.score_tokens([name], rows)[0] for name in NAMES])
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)
    single = [engine.score_tokens(["upper"], [row])[0][0, 0] for row in rows]
    np.testing.assert_allclose(together[1], single, atol=1e-4, rtol=0)


def test_rows_that_do_not_fit_are_refused(engine):
    with pytest.raises(PromptTooLong, match=r"must be >= 1 each and <= 513 together"):
        engine.score_tokens([None], [([1] * 510, [1, 2, 3, 4])])
    with pytest.raises(PromptTooLong, match="context tokens=0"):
        engine.score_tokens([None], [([], [1])])
    with pytest.raises(PromptTooLong, match="continuation tokens=0"):
        engine.score_tokens([None], [([1], [])])
    with pytest.raises(UnknownAdapter, match="nobody"):
        engine.score_tokens(["nobody"], [([1], [1])])
    assert engine.score_tokens([None], [([1] * 510, [1, 2, 3])])[0].shape == (1, 1)
    assert engine.score_tokens([None], [])[0].shape == (1, 0)
    assert engine.score_tokens([], [([1], [1])])[0].shape == (0, 1)


def test_progress_is_told(engine):
    told = []
    engine.score_tokens([None, "all"], random_rows(4, 12), progress=lambda *a: told.append(a))
    assert told[-1] == (24, 24)


def test_an_adapter_that_is_not_finite_shows(tiny, adapters):
    with InProcessEngine(tiny) as fresh:
        fresh.load("wild", adapters["upper"])
        for _, b in fresh._residents["wild"].parts.values():
            b.fill_(float("nan"))
        likelihoods, _ = fresh.score_tokens(["wild", None], random_rows(5, 4))
    assert not np.isfinite(likelihoods[0]).any()
    assert np.isfinite(likelihoods[1]).all()
