"""The engine's answers and scores against transformers and peft, one at a time."""

import asyncio

import numpy as np
import pytest
import torch

from learner.base import load_tokenizer
from learner.prompt import Renderer
from serving.engine import Finish, Piece, Sampling
from serving.errors import EngineError, PromptTooLong, QueueFull, UnknownAdapter
from serving.inprocess import InProcessEngine
from tests.serving.adapters import random_adapter

# peft reads a flag of transformers that is being renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROMPTS = [
    "where is my order",
    "hi",
    "My card was charged twice, and I would like to know why; can you look into that for me please?",
    "¿Dónde está 我的 订单 🙂?",
    "cancel it",
    "a b c d e f g h",
]
LABELS = ["order_status", "order_cancel", "order_cancel_all", "refund", "карта", "yes"]
NAMES = [None, "upper", "all", "stable", "patterns", "head", "narrow"]
TOKENS = 16


@pytest.fixture(scope="module")
def renderer(tiny):
    return Renderer(load_tokenizer(tiny))


def generated(model, renderer, prompt):
    """Greedy tokens of transformers.generate, decoded."""
    ids = renderer.prompt_ids(prompt)
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=[renderer.end_id],
        pad_token_id=renderer.tokenizer.pad_token_id,
    )
    return renderer.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


async def collect(engine, adapter, prompt, sampling):
    """(pieces, finish) of one answer."""
    answer = await engine.submit(adapter, engine.render([{"role": "user", "content": prompt}]), sampling)
    events = [event async for event in answer]
    assert isinstance(events[-1], Finish)
    assert all(isinstance(event, Piece) and event.text for event in events[:-1])
    return [event.text for event in events[:-1]], events[-1]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_equals_transformers_generate(engine, oracle, renderer, name):
    expected = [generated(oracle[name], renderer, prompt) for prompt in PROMPTS]
    assert [engine.generate(name, [prompt], TOKENS)[0] for prompt in PROMPTS] == expected  # alone
    assert engine.generate(name, PROMPTS, TOKENS) == expected  # in a batch
    assert len(set(expected)) > 1


def test_greedy_equals_transformers_generate_mixed_with_other_adapters(engine, oracle, renderer):
    async def all_at_once():
        asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
        answers = [collect(engine, name, prompt, Sampling(TOKENS)) for name, prompt in asked]
        return asked, await asyncio.gather(*answers)

    asked, answers = asyncio.run(all_at_once())
    for (name, prompt), (pieces, finish) in zip(asked, answers, strict=True):
        assert "".join(pieces) == generated(oracle[name], renderer, prompt)
        assert finish.prompt_tokens == len(renderer.prompt_ids(prompt))
        assert 1 <= finish.completion_tokens <= TOKENS


def teacher_forced(model, renderer, prompt, label):
    """Summed log-likelihood, one exchange at a time."""
    ids, start = renderer.example(prompt, label)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
    likelihood = logits.double().log_softmax(dim=-1)
    return sum(float(likelihood[at, token]) for at, token in enumerate(ids[start:]))


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_one_by_one(engine, oracle, renderer, name):
    scores = engine.score_labels(name, PROMPTS, LABELS)
    expected = [[teacher_forced(oracle[name], renderer, p, label) for label in LABELS] for p in PROMPTS]
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_scores_with_shared_lower_layers_equal_fresh_ones(tiny, adapters, oracle, renderer):
    with InProcessEngine(tiny) as fresh:
        fresh.load("upper", adapters["upper"])
        fresh.load("stable", adapters["stable"])
        fresh.load("head", adapters["head"])
        for name in ("upper", None, "stable", "head", "upper"):  # layer 0 is run once for all five
            scores = fresh.score_labels(name, PROMPTS[:3], LABELS[:3])
            expected = [[teacher_forced(oracle[name], renderer, p, label) for label in LABELS[:3]] for p in PROMPTS[:3]]
            np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_scores_of_one_prompt_an_empty_label_and_nothing(engine, oracle, renderer):
    scores = engine.score_labels(None, PROMPTS[:1], ["", "yes"])
    expected = [[teacher_forced(oracle[None], renderer, PROMPTS[0], label) for label in ("", "yes")]]
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    assert engine.score_labels(None, [], LABELS).shape == (0, len(LABELS))


def test_scores_are_counted_for_a_progress_bar(engine):
    seen = []
    engine.score_labels(None, PROMPTS, LABELS, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(PROMPTS), len(PROMPTS))


def test_a_seed_repeats_an_answer_and_temperature_varies_it(engine):
    async def ask(seed):
        return "".join((await collect(engine, "all", "hi", Sampling(12, 1.0, 0.9, seed)))[0])

    async def run():
        return [await ask(seed) for seed in (5, 5, 6, None, None)]

    first, again, other, *free = asyncio.run(run())
    assert first == again
    assert len({first, other, *free}) > 2


def test_a_nucleus_of_almost_nothing_is_greedy(engine):
    greedy = engine.generate("all", ["hi"], 12)[0]
    pieces, _ = asyncio.run(collect(engine, "all", "hi", Sampling(12, 1.0, 1e-9, 1)))
    assert "".join(pieces) == greedy


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_text_ends_the_answer_before_it(engine, length):
    whole = engine.generate("upper", ["hi"], TOKENS)[0]
    stop = whole[4 : 4 + length]
    pieces, finish = asyncio.run(collect(engine, "upper", "hi", Sampling(TOKENS, stop=("no such text", stop))))
    assert "".join(pieces) == whole[: whole.index(stop)]
    assert finish.reason == "stop"


def test_a_cancelled_answer_makes_room_and_disturbs_nobody(engine):
    async def run():
        ids = engine.render([{"role": "user", "content": "hi"}])
        long = [await engine.submit("all", ids, Sampling(400)) for _ in range(8)]
        other = asyncio.create_task(collect(engine, "upper", "hi", Sampling(TOKENS)))
        first = aiter(long[0])
        await anext(first)
        for answer in long:
            answer.cancel()
        pieces, _ = await other
        for _ in range(200):
            if engine.writing == 0:
                break
            await asyncio.sleep(0.01)
        return "".join(pieces)

    expected = engine.generate("upper", ["hi"], TOKENS)[0]
    assert asyncio.run(run()) == expected
    assert engine.writing == engine.waiting == 0


def test_a_full_queue_says_when_to_come_back(tiny):
    async def run(small):
        ids = small.render([{"role": "user", "content": "hi"}])
        answers = []
        with pytest.raises(QueueFull, match="must be < 2") as refused:
            for _ in range(20):
                answers.append(await small.submit(None, ids, Sampling(100)))  # noqa: PERF401 - kept when one fails
        assert refused.value.retry_after_s >= 1
        for answer in answers:
            answer.cancel()

    with InProcessEngine(tiny, batch_max=1, queue_max=2) as small:
        asyncio.run(run(small))


def test_what_does_not_fit_or_exist_is_refused(engine):
    async def submit(adapter, ids, tokens):
        await engine.submit(adapter, ids, Sampling(tokens))

    with pytest.raises(PromptTooLong, match=r"prompt tokens=3 \+ max_tokens=600: must be <= 512"):
        asyncio.run(submit(None, [1, 2, 3], 600))
    with pytest.raises(PromptTooLong, match="tokens=0"):
        asyncio.run(submit(None, [], 5))
    with pytest.raises(UnknownAdapter, match="adapter=nobody: not resident"):
        asyncio.run(submit("nobody", [1], 5))


def test_an_unloaded_adapter_finishes_its_answers(engine, tiny, tmp_path):
    random_adapter(tiny, tmp_path / "short-lived", 9)

    async def run():
        engine.load("short-lived", tmp_path / "short-lived")
        expected = "".join((await collect(engine, "short-lived", "hi", Sampling(100)))[0])
        answer = await engine.submit("short-lived", engine.render([{"role": "user", "content": "hi"}]), Sampling(100))
        engine.unload("short-lived")
        text = "".join([event.text async for event in answer if isinstance(event, Piece)])
        assert text == expected
        assert "short-lived" not in engine.resident

    asyncio.run(run())


def test_logits_that_are_not_finite_fail_one_answer_and_the_probe(engine, tiny, tmp_path):
    random_adapter(tiny, tmp_path / "wild", 4)
    engine.load("wild", tmp_path / "wild")
    wild = engine._residents["wild"]
    for _, b in wild.parts.values():
        b.fill_(float("inf"))
    with pytest.raises(EngineError, match="not finite on a probe"):
        engine.probe("wild")

    async def run():
        async def bad():
            with pytest.raises(EngineError, match="not finite"):
                await collect(engine, "wild", "hi", Sampling(TOKENS))

        good = [collect(engine, "upper", "hi", Sampling(TOKENS)) for _ in range(4)]
        return await asyncio.gather(bad(), *good, bad())

    expected = engine.generate("upper", ["hi"], TOKENS)[0]
    for _ in range(3):  # rows are used again: nothing of the NaN may stay behind
        answers = asyncio.run(run())
        assert all("".join(answer[0]) == expected for answer in answers if answer)
    engine.unload("wild")
    engine.probe("upper")
    engine.probe(None)


def test_a_closed_engine_fails_what_it_owes(tiny):
    async def run():
        engine = InProcessEngine(tiny)
        answer = await engine.submit(None, engine.render([{"role": "user", "content": "hi"}]), Sampling(400))
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineError, match="closed"):
            [event async for event in answer]
        with pytest.raises(EngineError, match="closed"):
            engine.probe(None)
        assert not engine.healthy

    asyncio.run(run())


def test_scores_of_heads_alone_share_every_layer(tiny, adapters, oracle, renderer):
    with InProcessEngine(tiny) as fresh:
        fresh.load("head", adapters["head"])
        for name in ("head", None):
            scores = fresh.score_labels(name, PROMPTS[:2], LABELS[:3])
            expected = [[teacher_forced(oracle[name], renderer, p, label) for label in LABELS[:3]] for p in PROMPTS[:2]]
            np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_different_adapters_say_different_things(engine):
    """Else the comparisons above could pass with an update left out."""
    answers = {name: tuple(engine.generate(name, PROMPTS, TOKENS)) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)
