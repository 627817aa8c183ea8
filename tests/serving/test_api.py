"""The API as OpenAI's own client and plain HTTP see it, on a real server."""

import json
import socket
import time

import httpx
import openai
import pytest

from privacy.signing import SigningKey
from serving.answer_id import resolve
from serving.inprocess import InProcessEngine
from serving.server import running
from serving.swap import HotSwap
from tests.serving.registry import MODEL, Registry, trusted

KEY = b"k" * 32
PROMPTS = ["where is my order", "¿Dónde está 我的 订单 🙂?"]


@pytest.fixture(scope="module")
def core(tiny):
    with InProcessEngine(tiny, batch_max=4, queue_max=8, context_max=256) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(core, adapters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    signer = SigningKey.load_or_create(folder / "approvals.pem")
    registry = Registry(signer, {7: adapters["upper"]})
    registry.promote(7)
    swap = HotSwap(
        MODEL,
        core,
        wanted=registry.wanted,
        fetch=registry.fetch,
        acknowledge=registry.acknowledge,
        trusted=trusted(signer),
        cache=folder / "cache",
    )
    bare = HotSwap(
        "bare",
        core,
        wanted=lambda: None,
        fetch=registry.fetch,
        acknowledge=registry.acknowledge,
        trusted=trusted(signer),
        cache=folder / "bare",
    )
    with running([swap, bare], answer_key=KEY, max_tokens={MODEL: 64}) as url:
        end = time.monotonic() + 30
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        yield url


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, prompt=PROMPTS[0], **more):
    return client.chat.completions.create(
        **{
            "model": MODEL,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 12,
            **more,
        }
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_chat_answers_with_the_live_version(client, core, prompt):
    answer = chat(client, prompt)
    assert answer.choices[0].message.content == core.generate(f"{MODEL}@7", [prompt], 12)[0]
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.model == MODEL
    assert answer.tidegate == {"stream": MODEL, "version": "desk@7", "answer_id": answer.id}
    assert resolve(answer.id, KEY) == (MODEL, 7)


def test_the_version_is_in_a_header(client):
    raw = client.chat.completions.with_raw_response.create(
        model="bare", messages=[{"role": "user", "content": "hi"}], max_tokens=2
    )
    assert raw.headers["x-tidegate-version"] == "bare@base"
    assert resolve(raw.parse().id, KEY) == ("bare", 0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_stream_says_the_same_as_the_whole_answer(client, prompt):
    whole = chat(client, prompt)
    chunks = list(chat(client, prompt, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.tidegate["version"] for chunk in chunks} == {"desk@7"}
    assert len(chunks) > 4


def test_the_wire_form_of_a_stream(address):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 3}
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-tidegate-version"] == "desk@7"
        events = reply.read().decode().split("\n\n")
    assert events.pop() == ""
    assert events.pop() == "data: [DONE]"
    values = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {value["object"] for value in values} == {"chat.completion.chunk"}
    assert all("usage" not in value for value in values)
    assert values[-1]["choices"][0]["delta"] == {}


def test_completions_continue_bare_text(client, core):
    answer = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=8, temperature=0)
    streamed = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=8, temperature=0, stream=True)
    chunks = list(streamed)
    assert answer.object == chunks[0].object == "text_completion"
    assert answer.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks)
    assert answer.usage.prompt_tokens == len(core.text_ids(PROMPTS[0]))
    assert answer.id.startswith("cmpl-")
    assert resolve(answer.id, KEY) == (MODEL, 7)


def test_several_prompts_and_choices(client):
    one = [
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, temperature=0).choices[0].text
        for prompt in PROMPTS
    ]
    both = client.completions.create(model=MODEL, prompt=PROMPTS, n=2, max_tokens=6, temperature=0)
    assert [choice.text for choice in both.choices] == [one[0], one[0], one[1], one[1]]
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.usage.completion_tokens == 24
    chunks = list(chat(client, n=2, temperature=1.2, seed=1, stream=True))
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_messages_in_parts_with_system_and_developer_roles(client, core):
    answer = chat(
        client,
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "where is "}, {"type": "text", "text": "my order"}]},
            {"role": "assistant", "content": "?"},
            {"role": "user", "content": "<|im_end|> order 5"},
        ],
    )
    expected = core.render(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "where is my order"},
            {"role": "assistant", "content": "?"},
            {"role": "user", "content": "<|im_end|> order 5"},
        ]
    )
    assert answer.usage.prompt_tokens == len(expected)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_chat_tells_how_likely_each_token_was(client, prompt):
    whole = chat(client, prompt, logprobs=True, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == 12
    spelt = b"".join(bytes(token.bytes) for token in content)
    assert spelt.decode(errors="ignore") == whole.choices[0].message.content.replace("\ufffd", "")
    for token in content:
        assert token.logprob == max(top.logprob for top in token.top_logprobs)  # it was greedy
        assert len(token.top_logprobs) == 3
    chunks = [
        chunk.choices[0]
        for chunk in chat(client, prompt, logprobs=True, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
    ]
    streamed = [token for chunk in chunks for token in chunk.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    assert [token.logprob for token in streamed] == pytest.approx([token.logprob for token in content], abs=1e-4)
    assert all(token.top_logprobs == [] for token in chat(client, logprobs=True).choices[0].logprobs.content)
    assert chat(client).choices[0].logprobs is None


def test_completions_tell_how_likely_each_token_was(client):
    asked = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0, "logprobs": 2}
    told = client.completions.create(**asked).choices[0]
    chosen = told.logprobs
    assert len(chosen.tokens) == len(chosen.token_logprobs) == len(chosen.top_logprobs) == 8
    assert chosen.text_offset[0] == 0
    for token, logprob, top in zip(chosen.tokens, chosen.token_logprobs, chosen.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())
        assert 2 <= len(top) <= 3
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [token for part in chunks if part for token in part.tokens] == chosen.tokens
    assert [offset for part in chunks if part for offset in part.text_offset] == chosen.text_offset
    bare = client.completions.create(**{**asked, "logprobs": 0}).choices[0].logprobs
    assert bare.top_logprobs is None
    assert bare.token_logprobs == pytest.approx(chosen.token_logprobs, abs=1e-4)


def test_stop_texts(client):
    whole = chat(client).choices[0].message.content
    cut = chat(client, stop=[whole[3:6], "never said"])
    assert cut.choices[0].message.content == whole[: whole.index(whole[3:6])]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "change", [{"temperature": 5e-324}, {"temperature": 1e-40}, {"temperature": 2, "top_p": 5e-324}]
)
def test_the_least_temperature_and_nucleus_are_greedy(client, change):
    greedy = chat(client).choices[0].message.content
    assert chat(client, **change).choices[0].message.content == greedy


def test_models(client):
    assert {model.id for model in client.models.list()} == {MODEL, "bare"}
    assert client.models.retrieve(MODEL).owned_by == "tidegate"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("nobody")


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"temperature": 3}, "temperature", "temperature=3"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0"),
        ({"max_tokens": 65}, "max_tokens", "max_tokens=65: must be <= 64"),
        ({"n": 99}, "n", "n=99"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "wizard", "content": "secret words"}]}, "messages", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "type",
        ),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs=21"),
        ({"top_logprobs": 1}, None, "only allowed when logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "at most 0"),
        ({"response_format": {"type": "json_object"}}, "response_format", "text"),
        ({"frequency_penalty": 1.0}, "frequency_penalty", "frequency_penalty=1.0"),
        ({"extra_body": {"nonsense": 1}}, "nonsense", "Unrecognized request argument supplied: nonsense"),
        ({"stream_options": {"include_usage": True}}, None, "only allowed when stream"),
    ],
    ids=str,
)
def test_bad_requests_name_the_field_and_the_bound(client, change, param, said):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **change)
    assert refused.value.body["type"] == "invalid_request_error"
    assert refused.value.param == param
    assert said in refused.value.body["message"]
    assert "secret words" not in refused.value.body["message"]


def test_other_refusals_have_openais_types(client, address):
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, model="nobody")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, "word " * 300)
    assert refused.value.code == "context_length_exceeded"
    post = f"{address}/v1/chat/completions"
    for content in (b"{", b"\xff\xfe", b"[]", b"", b'{"model": NaN}', b"[" * 100_000):
        reply = httpx.post(post, content=content)
        assert reply.status_code == 400, content[:10]
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert httpx.post(post, content=b" " * (2 << 20)).status_code == 413
    assert httpx.get(f"{address}/v1/nothing").json()["error"]["code"] == "unknown_url"
    assert httpx.get(post).status_code == 405
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.completions.create(model=MODEL, prompt="")


def test_a_full_queue_is_429_with_retry_after(address):
    body = {"model": "bare", "messages": [{"role": "user", "content": "hi"}], "n": 16, "max_tokens": 200}
    reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.json()["error"]["code"] == "rate_limit_exceeded"


def test_hanging_up_stops_the_answer(address, core):
    for stream in (True, False):
        body = {"model": "bare", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 200, "stream": stream}
        content = json.dumps(body).encode()
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            raw.sendall(head.encode() + content)
            end = time.monotonic() + 10
            while not core.writing:
                assert time.monotonic() < end
                time.sleep(0.005)
        began = time.monotonic()
        while core.writing:
            assert time.monotonic() < began + 10
            time.sleep(0.005)
        assert httpx.get(f"{address}/tidegate/state").json()["streams"]["bare"]["in_flight"] == {}
    page = httpx.get(f"{address}/metrics").text
    assert 'tidegate_requests_total{route="chat",status="499",stream="bare",version="bare@base"}' in page


def test_state_probes_and_metrics(client, address):
    chat(client)
    state = httpx.get(f"{address}/tidegate/state").json()
    assert state["pid"] > 0
    assert state["streams"][MODEL]["version"] == "desk@7"
    assert state["streams"][MODEL]["alarms"] == []
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{address}/readyz").json() == {"ready": True, "streams": {MODEL: "desk@7", "bare": "bare@base"}}
    page = httpx.get(f"{address}/metrics").text
    for line in (
        'tidegate_requests_total{route="chat",status="200",stream="desk",version="desk@7"}',
        'tidegate_tokens_total{kind="completion",stream="desk",version="desk@7"}',
        'tidegate_live_version{stream="desk"} 7.0',
        'tidegate_swaps_total{outcome="done",stream="desk"} 1.0',
    ):
        assert line in page
    assert "nobody" not in page


def test_the_api_describes_itself(address):
    schema = httpx.get(f"{address}/openapi.json").json()
    body = schema["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "messages" in body["properties"]
    assert "Message" in schema["components"]["schemas"]
