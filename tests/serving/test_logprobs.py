"""Log-probabilities of an answer's tokens, and answers that run out of time."""

import asyncio

import pytest
import torch

from learner.base import load_tokenizer
from serving.engine import LOGPROBS_MAX, Finish, Piece, Sampling
from serving.errors import AnswerTimeout
from serving.inprocess import InProcessEngine
from serving.text import token_bytes

PROMPT = "¿Dónde está 我的 订单 🙂?"
TOKENS = 12

# peft reads a flag of transformers that is being renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def ids_of(engine):
    return engine.render([{"role": "user", "content": PROMPT}])


def pieces_of(engine, adapter, sampling):
    async def run():
        answer = await engine.submit(adapter, ids_of(engine), sampling)
        return [event async for event in answer if isinstance(event, Piece)]

    return asyncio.run(run())


def said(pieces):
    return "".join(piece.text for piece in pieces)


def tokens_of(pieces):
    return [token for piece in pieces for token in piece.tokens]


def test_each_token_has_the_logarithm_that_the_model_gives_it(engine, oracle, tiny):
    tokens = tokens_of(pieces_of(engine, "all", Sampling(TOKENS, logprobs=3)))
    tokenizer = load_tokenizer(tiny).backend_tokenizer
    ids = ids_of(engine)
    assert len(tokens) == TOKENS
    for token in tokens:
        with torch.inference_mode():
            logprobs = oracle["all"](input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
        values, best = logprobs.topk(3)
        assert [one.raw for one in token.top] == [token_bytes(tokenizer, i) for i in best.tolist()]
        assert [one.logprob for one in token.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert (token.raw, token.logprob) == (token.top[0].raw, token.top[0].logprob)
        ids.append(int(best[0]))


def test_a_hot_answer_is_told_by_the_model_and_not_by_the_temperature(engine):
    pieces = pieces_of(engine, "all", Sampling(TOKENS, 1.8, 1.0, seed=3, logprobs=LOGPROBS_MAX))
    for token in tokens_of(pieces):
        assert len(token.top) == LOGPROBS_MAX
        assert [one.logprob for one in token.top] == sorted((one.logprob for one in token.top), reverse=True)
        assert token.logprob <= token.top[0].logprob < 0
    assert any(token.raw != token.top[0].raw for token in tokens_of(pieces))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_the_bytes_of_the_tokens_are_the_text(engine, temperature):
    for seed in range(4):
        sampling = Sampling(40, temperature, seed=seed, logprobs=0)
        pieces = pieces_of(engine, "upper", sampling)
        raw = b"".join(token.raw for token in tokens_of(pieces))
        assert raw.decode(errors="replace") == said(pieces)
        assert not any(token.top for token in tokens_of(pieces))


def test_a_stop_text_takes_its_tokens_along(engine):
    whole = said(pieces_of(engine, "upper", Sampling(TOKENS)))
    stop = whole[7:12]
    pieces = pieces_of(engine, "upper", Sampling(TOKENS, stop=(stop,), logprobs=0))
    raw = b"".join(token.raw for token in tokens_of(pieces)).decode(errors="replace")
    assert said(pieces) == whole[: whole.index(stop)]
    assert raw.startswith(said(pieces))
    last = tokens_of(pieces)[-1].raw.decode(errors="replace")
    assert len(raw) - len(last) < len(said(pieces)), "each token told of begins before the stop text"


def test_nobody_who_does_not_ask_gets_them_and_the_answer_is_the_same(engine):
    plain, told = (pieces_of(engine, "all", Sampling(TOKENS, logprobs=asked)) for asked in (None, 2))
    assert said(plain) == said(told)
    assert not tokens_of(plain)


def test_bytes_of_every_token_of_the_vocabulary_are_what_it_decodes_to(tiny):
    tokenizer = load_tokenizer(tiny).backend_tokenizer
    for token in range(0, tokenizer.get_vocab_size(), 97):
        decoded = tokenizer.decode([token], skip_special_tokens=False)
        assert token_bytes(tokenizer, token).decode(errors="replace") == decoded
    assert token_bytes(tokenizer, 10**6) == b""


def test_an_answer_out_of_time_fails_and_its_neighbour_does_not(tiny):
    async def run(small):
        ids = ids_of(small)
        late = await small.submit(None, ids, Sampling(400, timeout_s=0.15))
        queued = await small.submit(None, ids, Sampling(1, timeout_s=0.0))
        other = await small.submit(None, ids, Sampling(TOKENS, timeout_s=60))
        for answer in (late, queued):
            with pytest.raises(AnswerTimeout, match=r"after 0\.\d+ s, must be whole by then"):
                [event async for event in answer]
        events = [event async for event in other]
        assert isinstance(events[-1], Finish)
        for _ in range(200):  # the last one is told before its row is free
            if small.writing == 0:
                break
            await asyncio.sleep(0.01)

    with InProcessEngine(tiny, batch_max=1) as small:
        asyncio.run(run(small))
        assert small.writing == small.waiting == 0
