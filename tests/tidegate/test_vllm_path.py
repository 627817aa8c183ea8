"""`tidegate up` with vLLM as the engine and two replicas behind a router, by the commands a user types."""

import os
import signal
import threading

import httpx
import psutil
import pytest
import yaml

from tests.kafka_servers import missing
from tests.serving.vllm_server import python
from tests.tidegate.desk import STREAM, free_port, make_desk
from tests.tiny import tiny_base

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_up_starts_vllm_replicas_and_router_and_brings_back_what_is_killed(tmp_path):
    if python() is None:
        missing(".venv-vllm; `make vllm` builds it")
    from tidegate.up import start_all

    desk = make_desk(tmp_path / "ws", tiny_base(tmp_path / "base", hidden=64))
    file = desk.root / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params["service"]["replicas"] = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    params["streams"][STREAM]["serving"] |= {"engine": "vllm", "vllm_url": f"http://127.0.0.1:{free_port()}"}
    file.write_text(yaml.safe_dump(params))
    service = desk.service()
    supervisor = start_all(service, lambda _line: None, learn=False)
    ended = threading.Event()
    watching = threading.Thread(target=supervisor.watch, args=(ended.is_set,))
    watching.start()
    try:
        body = {"model": STREAM, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}

        def ask():
            return httpx.post(f"{service.api_uri}/v1/chat/completions", json=body, timeout=60)

        def ready():
            return httpx.get(f"{service.api_uri}/readyz").status_code == 200

        first = ask()
        assert first.headers["x-tidegate-version"] == f"{STREAM}@base"
        state = httpx.get(f"{service.api_uri}/tidegate/state").json()
        assert [replica["up"] for replica in state["replicas"]] == [True, True]
        vllm = next(part.process.pid for part in supervisor.parts if part.name.startswith("vllm"))
        for process in [*psutil.Process(vllm).children(recursive=True), psutil.Process(vllm)]:
            os.kill(process.pid, signal.SIGKILL)
        desk.wait(lambda: not ready(), what="nobody can answer")
        assert ask().status_code == 503
        desk.wait(ready, what="vLLM is back")
        again = ask().json()
        assert again["choices"] == first.json()["choices"]
    finally:
        ended.set()
        watching.join()
        supervisor.stop()
