"""Clients that know nothing of Tidegate, unchanged, against a running server that asks for a key; streaming too."""

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import openai
import pytest

from serving.access import Access, add_key
from serving.answer_id import resolve
from serving.inprocess import InProcessEngine
from tests.serving.desk import ANSWER_KEY, served
from tests.serving.registry import MODEL

NODE = Path(__file__).parent / "node"
PROMPT = "¿Dónde está 我的 订单 🙂?"
TOKENS = 12


@pytest.fixture(scope="module")
def place(tiny, adapters, tmp_path_factory):
    """Address, key, and what the live version says to PROMPT."""
    folder = tmp_path_factory.mktemp("clients")
    file = folder / "api_keys.json"
    key, _ = add_key(file, "client", scopes=["answer"], requests_per_minute=100_000)
    with (
        InProcessEngine(tiny, context_max=512) as engine,
        served(engine, adapters["upper"], folder, access=Access(file)) as url,
    ):
        yield url, key, engine.generate(f"{MODEL}@7", [PROMPT], TOKENS)[0]


@pytest.fixture(scope="module")
def url(place):
    return f"{place[0]}/v1"


@pytest.fixture(scope="module")
def key(place):
    return place[1]


@pytest.fixture(scope="module")
def expected(place):
    return place[2]


def body(**more):
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": MODEL, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **more}


def test_openai_for_python(url, key, expected):
    with openai.OpenAI(base_url=url, api_key=key) as client:
        answer = client.chat.completions.create(**body())
        assert answer.choices[0].message.content == expected
        assert resolve(answer.id, ANSWER_KEY) == (MODEL, 7)
        assert answer._request_id == answer.id
        chunks = list(client.chat.completions.create(**body(stream=True)))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        with client.chat.completions.stream(**body()) as stream:
            assert "".join(event.delta for event in stream if event.type == "content.delta") == expected


def test_openai_for_python_asynchronously(url, key, expected):
    asyncio.run(ask_asynchronously(url, key, expected))


async def ask_asynchronously(url, key, expected):
    async with openai.AsyncOpenAI(base_url=url, api_key=key) as client:
        answer = await client.chat.completions.create(**body())
        assert answer.choices[0].message.content == expected
        texts = [
            chunk.choices[0].delta.content async for chunk in await client.chat.completions.create(**body(stream=True))
        ]
        assert "".join(filter(None, texts)) == expected


def test_langchains_chat_openai(url, key, expected):
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=url, api_key=key, model=MODEL, temperature=0, max_tokens=TOKENS)
    said = chat.invoke([HumanMessage(PROMPT)])
    assert said.content == expected
    assert said.usage_metadata["output_tokens"] == TOKENS
    assert said.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == expected
    assert [one.content for one in chat.batch([PROMPT, PROMPT])] == [expected, expected]
    likely = chat.bind(logprobs=True, top_logprobs=2).invoke(PROMPT)
    assert len(likely.response_metadata["logprobs"]["content"]) == TOKENS
    assert chat.invoke([SystemMessage("Be brief."), HumanMessage("hi")]).content


def curl(url, key, *more):
    command = ["curl", "-sS", "-N", "--max-time", "60", f"{url}/chat/completions", "-H", f"Authorization: Bearer {key}"]
    command += ["-H", "Content-Type: application/json", *more]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not shutil.which("curl") and os.environ.get("CI") != "true", reason="no curl here")
def test_curl(url, key, expected):
    answer = json.loads(curl(url, key, "-d", json.dumps(body())))
    assert answer["choices"][0]["message"]["content"] == expected
    events = curl(url, key, "-d", json.dumps(body(stream=True))).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    refused = curl(url, "none", "-d", json.dumps(body()), "-w", "\n%{http_code}").split("\n")
    assert refused[-1] == "401"
    assert json.loads(refused[0])["error"]["code"] == "invalid_api_key"


@pytest.mark.slow
def test_openai_for_node(url, key, expected, tmp_path):
    """Its packages come from the npm registry, pinned by package-lock.json."""
    for name in ("package.json", "package-lock.json", "ask.mjs"):
        shutil.copy(NODE / name, tmp_path)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=tmp_path, check=True, timeout=300)
    asked = {**os.environ, "OPENAI_BASE_URL": url, "OPENAI_API_KEY": key, "ASKED": json.dumps(body())}
    done = subprocess.run(
        ["node", "ask.mjs"], cwd=tmp_path, env=asked, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    print(told)  # noqa: T201 - `pytest -s` shows it
    assert told["whole"] == told["streamed"] == expected
    assert told["usage"]["completion_tokens"] == TOKENS
    assert told["models"] == [MODEL, "bare"]
    assert told["version"] == f"{MODEL}@7"
    assert told["refused"] == {"status": 401, "code": "invalid_api_key", "name": "AuthenticationError"}
    assert told["wrong"]["status"] == 400
    assert resolve(told["id"], ANSWER_KEY) == (MODEL, 7)
