"""An adapter that cannot be used gets a verdict that says so; the round that made it comes to an end."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from evaluation.private import PrivateScores
from learner.plan import BlockAccount, plan_round
from serving.inprocess import InProcessEngine
from tests.evaluation.planted import write_gate_set
from tests.serving.adapters import random_adapter
from tests.tidegate.streams import STREAM, seal, workspace
from tidegate.evidence import facts_about, judge_with
from tidegate.planning import register_blocks

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def good(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "good"
    random_adapter(tiny, folder, 1)
    return folder


@pytest.fixture(scope="module")
def engine(tiny):
    with InProcessEngine(tiny, system="") as made:
        yield made


def ruin(folder, how):
    file = folder / "adapter_model.safetensors"
    if how == "missing":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "NaN":
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        weights = load_file(file)
        weights[next(iter(weights))][0, 0] = float("nan")
        save_file(weights, file, metadata)


def judged(service, engine, tiny, folder, gate_set):
    block = seal(service, 1)
    register_blocks(service, STREAM, "0" * 40)
    policy = service.policy(STREAM)
    plan = plan_round(
        round_id=f"{STREAM}-r0001",
        attempt=1,
        stream=STREAM,
        parent_sha256=None,
        base_sha256=tiny.sha256,
        data_revision="0" * 40,
        new=[BlockAccount(block, policy.frozen(500), (0.0,) * len(policy.orders))],
    )
    facts = facts_about(service, plan, folder, "a" * 64, tiny)
    return judge_with(
        service,
        STREAM,
        engine,
        gate_set,
        folder,
        None,
        facts,
        private=lambda: PrivateScores(None, refusal="not asked"),
        tell=lambda *_: None,
    )


@pytest.mark.parametrize("how", ["whole", "NaN", "missing", "cut short"])
def test_a_broken_adapter_fails_with_the_reason(tmp_path, tiny, engine, good, how):
    folder = shutil.copytree(good, tmp_path / "adapter")
    ruin(folder, how)
    gate_set = write_gate_set(tmp_path / "set.jsonl", per_domain=2)
    found = judged(workspace(tmp_path / "ws"), engine, tiny, folder, gate_set)
    if how == "whole":
        assert found.outcome == "undecided", "six records decide nothing, and the engine was asked"
        return
    assert found.outcome == "failed"
    assert found.reasons[0].startswith("the adapter cannot be used: ")
    assert {"NaN": "holds NaN", "missing": "adapter_model.safetensors", "cut short": "adapter_model"}[how] in (
        found.reasons[0]
    )
    assert not found.figures
