"""How vLLM and replicas are started for a workspace; nothing is started here."""

from dataclasses import replace
from itertools import pairwise

import pytest

from serving.vllm import model_name
from tidegate.config import LoraConfig, load
from tidegate.errors import ConfigError
from tidegate.route import address_of, local_replicas, name_of, router_of
from tidegate.serve import run_server
from tidegate.up import parts_of
from tidegate.vllm import command, engines_on_vllm, environment, rank_max, run_vllm
from tidegate.wiring import Service
from tidegate.workspace import CHECKOUT, Workspace

STREAM = "support-desk"
ON_VLLM = {"TIDEGATE__STREAMS__SUPPORT_DESK__SERVING__ENGINE": "vllm"}
REPLICAS = {"TIDEGATE__SERVICE__REPLICAS": "[http://127.0.0.1:8081, http://10.0.0.7:8081]"}


def service(root, **environ):
    return Service(Workspace(root), load(CHECKOUT / "params.yaml", environ))


def test_vllm_is_told_the_base_by_name_and_hash_and_room_for_the_largest_rank(tiny, tmp_path):
    words = command(tmp_path / "python", tiny, "http://127.0.0.1:8100", rank=16, dtype="bfloat16", more=["--seed", "1"])
    told = dict(pairwise(words))
    assert told["--served-model-name"] == model_name(tiny) == f"{tiny.name}@{tiny.sha256[:12]}"
    assert (told["--model"], told["--port"], told["--dtype"]) == (str(tiny.path), "8100", "bfloat16")
    assert words[-2:] == ["--seed", "1"]
    assert rank_max([LoraConfig(r=4), LoraConfig(r=8, rank_pattern={"up_proj": 20})]) == 32
    other = replace(tiny, sha256="0" * 64)
    assert model_name(other) != model_name(tiny)


def test_adapters_may_be_loaded_only_with_the_key_and_nothing_is_fetched(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "ours")
    made = environment("secret")
    assert made["VLLM_API_KEY"] == "secret"
    assert made["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert made["HF_HUB_OFFLINE"] == "1"
    assert "PYTHONPATH" not in made


def test_vllm_starts_for_streams_on_it_alone_and_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match="engine=inprocess"):
        run_vllm(service(tmp_path), STREAM, tmp_path)
    on_vllm = service(tmp_path, **ON_VLLM)
    assert engines_on_vllm(on_vllm) == {"http://127.0.0.1:8100": STREAM}
    with pytest.raises(ConfigError, match="make vllm"):
        run_vllm(on_vllm, STREAM, tmp_path)
    names = [part.name for part in parts_of(on_vllm)]
    assert names.index(f"vllm-{STREAM}") < names.index("serve")


def test_bottlenecks_and_vllm_are_refused_together():
    both = {**ON_VLLM, "TIDEGATE__STREAMS__SUPPORT_DESK__LEARNER__LORA__BOTTLENECK": "8"}
    with pytest.raises(ConfigError, match="bottleneck"):
        load(CHECKOUT / "params.yaml", both)


def test_replicas_of_this_machine_are_started_and_the_router_last(tmp_path):
    two = service(tmp_path, **REPLICAS)
    assert local_replicas(two) == ["http://127.0.0.1:8081"]
    names = [part.name for part in parts_of(two, learn=False)]
    assert names[-2:] == ["serve-127.0.0.1-8081", "route"]
    assert address_of(two, "http://10.0.0.7:8081") == ("10.0.0.7", 8081)
    assert two.api_keys_required  # one of them is reached by other machines
    assert name_of("http://[::1]:8081") == "--1-8081"


def test_a_server_that_is_no_replica_does_not_start_where_there_are_some(tmp_path):
    two = service(tmp_path, **REPLICAS)
    for replica in (None, "http://127.0.0.1:9999"):
        with pytest.raises(ConfigError, match=r"service\.replicas"):
            run_server(two, replica)
    with pytest.raises(ConfigError, match="one server needs no router"):
        router_of(service(tmp_path))


@pytest.mark.parametrize("urls", ["[127.0.0.1:8081]", "[http://a:1/v1]", "[http://a:1, http://a:1]", "[https://a:1]"])
def test_what_is_no_address_of_a_replica_is_refused(urls):
    with pytest.raises(ConfigError, match="replicas"):
        load(CHECKOUT / "params.yaml", {"TIDEGATE__SERVICE__REPLICAS": urls})
