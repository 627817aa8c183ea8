"""Greedy answers are transformers' own, token for token, but where two tokens are as good as equal."""

import asyncio
import os
import warnings
from itertools import zip_longest
from pathlib import Path

import httpx
import pytest
import torch

from learner.base import EMBEDDED, load_model, load_tokenizer, prepare_base
from learner.prompt import Renderer
from privacy.signing import SigningKey
from serving.engine import Piece, Sampling
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from serving.text import token_bytes
from tests.serving.adapters import random_adapter
from tests.serving.registry import MODEL, Registry, trusted

# peft reads a flag of transformers that is being renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TIE = 1e-4
TOKENS = 24
PROMPTS = [
    "where is my order",
    "hi",
    "My card was charged twice, and I would like to know why; can you look into that for me please?",
    "¿Dónde está 我的 订单 🙂?",
]
NAMES = [None, "upper", "all", "stable", "patterns", "head", "narrow"]


def generated(model, renderer, prompt, tokens=TOKENS):
    """Token ids of transformers.generate, without the one that ends the answer."""
    ids = renderer.prompt_ids(prompt)
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=[renderer.end_id],
        pad_token_id=renderer.tokenizer.pad_token_id,
    )[0, len(ids) :].tolist()
    return [token for token in out if token != renderer.end_id]


async def spoken(engine, adapter, prompt, tokens=TOKENS):
    """The bytes of an answer's tokens, and its pieces."""
    ids = engine.render([{"role": "user", "content": prompt}])
    answer = await engine.submit(adapter, ids, Sampling(tokens, logprobs=0))
    pieces = [event async for event in answer if isinstance(event, Piece)]
    return [token.raw for piece in pieces for token in piece.tokens], [piece.text for piece in pieces]


def same_but_for_ties(model, renderer, prompt, expected, found):
    """Whether `found`, bytes of tokens, is `expected`, ids, up to a place where the model sees two as equal."""
    ids = renderer.prompt_ids(prompt)
    tokenizer = renderer.tokenizer.backend_tokenizer
    for at, (want, got) in enumerate(zip_longest(expected, found)):
        if want is not None and token_bytes(tokenizer, want) == got:
            continue
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids + expected[:at]])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        return best - second < TIE
    return True


@pytest.fixture(scope="module")
def renderer(tiny):
    return Renderer(load_tokenizer(tiny))


@pytest.fixture(scope="module")
def reference(oracle, renderer):
    return {(name, prompt): generated(oracle[name], renderer, prompt) for name in NAMES for prompt in PROMPTS}


def test_alone_every_token_is_that_of_transformers(engine, oracle, renderer, reference):
    for (name, prompt), expected in reference.items():
        found, _ = asyncio.run(spoken(engine, name, prompt))
        assert same_but_for_ties(oracle[name], renderer, prompt, expected, found), (name, prompt)


def test_among_other_adapters_that_come_and_go_too(engine, oracle, renderer, reference):
    async def staggered():
        running_answers = []
        for name, prompt in reference:
            running_answers.append(asyncio.create_task(spoken(engine, name, prompt)))
            await asyncio.sleep(0.003)  # joins answers that are being written
        return await asyncio.gather(*running_answers)

    answers = asyncio.run(staggered())
    for ((name, prompt), expected), (found, _) in zip(reference.items(), answers, strict=True):
        assert same_but_for_ties(oracle[name], renderer, prompt, expected, found), (name, prompt)


def test_the_comparison_can_fail(oracle, renderer, reference):
    tokenizer = renderer.tokenizer.backend_tokenizer
    expected = reference["all", PROMPTS[0]]
    right = [token_bytes(tokenizer, token) for token in expected]

    def same(found, name="all"):
        return same_but_for_ties(oracle[name], renderer, PROMPTS[0], expected, found)

    assert same(right)
    assert not same([*right[:3], b" other", *right[4:]])
    assert not same(right[:-1])
    assert not same([*right, b" more"])
    with_upper = [token_bytes(tokenizer, token) for token in reference["upper", PROMPTS[0]]]
    assert not same(with_upper)


def test_a_stream_says_what_a_whole_answer_says(engine, adapters, tmp_path):
    registry = Registry(SigningKey.load_or_create(tmp_path / "approvals.pem"), {1: adapters["all"]})
    registry.promote(1)
    source = {"wanted": registry.wanted, "fetch": registry.fetch, "acknowledge": registry.acknowledge}
    swap = HotSwap(MODEL, engine, cache=tmp_path / "cache", trusted=trusted(registry.signer), **source)
    swap.tick()
    with running([swap], answer_key=b"k" * 32) as url:
        for prompt in PROMPTS:
            body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS}
            body["temperature"] = 0
            whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            stream = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}, timeout=60).text
            chunks = [httpx.Response(200, text=line[6:]).json() for line in stream.split("\n\n") if line[6:7] == "{"]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            assert text == whole["choices"][0]["message"]["content"]
            assert text == engine.generate("all", [prompt], TOKENS)[0]
            assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]


@pytest.mark.slow
def test_on_the_135m_base_too(tmp_path):
    from peft import PeftModel

    base = prepare_base(
        EMBEDDED, Path(os.environ.get("TIDEGATE_BASES", Path(__file__).parents[2] / "workspace" / "bases"))
    )
    renderer = Renderer(load_tokenizer(base))
    models = {None: load_model(base)}
    with InProcessEngine(base, threads=2, batch_max=8) as engine:
        for seed, name in enumerate(("upper", "all")):
            layers = tuple(range(24, 30)) if name == "upper" else tuple(range(30))
            random_adapter(base, tmp_path / name, seed, layers=layers, scale=0.08)
            engine.load(name, tmp_path / name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                models[name] = PeftModel.from_pretrained(load_model(base), str(tmp_path / name)).eval()
        expected = {(n, p): generated(models[n], renderer, p) for n in models for p in PROMPTS}

        async def together():
            return await asyncio.gather(*(spoken(engine, name, prompt) for name, prompt in expected))

        mixed = asyncio.run(together())
        alone = [asyncio.run(spoken(engine, name, prompt)) for name, prompt in expected]
    assert len({tuple(ids) for ids in expected.values()}) == len(expected)
    for answers in (alone, mixed):
        for ((name, prompt), ids), (found, _) in zip(expected.items(), answers, strict=True):
            assert same_but_for_ties(models[name], renderer, prompt, ids, found), (name, prompt)
