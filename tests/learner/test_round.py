import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
import torch

import learner.round
from learner.adapter import adapter_sha256, read_adapter
from learner.base import load_model
from learner.errors import AdapterError, ResumeRefused, RoundError
from learner.plan import BlockRate, LoraSettings
from learner.round import Speed, _precision, _start, run_round
from privacy.randomness import RoundKey, TestKey
from tests.learner.rounds import examples, plan, records

ROOT = Path(__file__).resolve().parents[2]


def blocks():
    return {"b1": records(40), "b2": records(30, block="b2", seed=1)}


def run(base, folder, of=None, **changes):
    values = {
        "base": base,
        "parent_dir": None,
        "records": blocks(),
        "key": TestKey(5),
        "system": "",
        "checkpoint_dir": folder / "checkpoint",
        "out_dir": folder / "adapter",
        "max_tokens": 64,
        "speed": Speed(checkpoint_steps=2),
    }
    return run_round(of or plan(base), **{**values, **changes})


class Stop(Exception):
    pass


def stop_after(step):
    def progress(done, steps):
        if done == step:
            raise Stop

    return progress


def test_a_round_writes_an_adapter_that_moved_and_says_nothing_private(tiny, tmp_path):
    seen = []
    with structlog.testing.capture_logs() as logs:
        output = run(tiny, tmp_path, progress=lambda *args: seen.append(args))
    assert seen == [(step, 6) for step in range(7)]
    assert output.adapter_sha256 == adapter_sha256(output.adapter_dir)
    assert output.max_abs_delta > 0
    assert not output.resumed
    assert [set(entry) for entry in logs] == [{"event", "log_level", "stream", "round_id", "attempt", "steps"}]


def test_test_noise_repeats_bit_for_bit_and_another_seed_does_not(tiny, tmp_path):
    first = run(tiny, tmp_path / "1").adapter_sha256
    assert run(tiny, tmp_path / "2").adapter_sha256 == first
    assert run(tiny, tmp_path / "3", key=TestKey(6)).adapter_sha256 != first


@pytest.mark.parametrize("after", [1, 2, 5, 6])
def test_an_interrupted_round_ends_in_the_same_bytes(tiny, tmp_path, after):
    whole = run(tiny, tmp_path / "whole").adapter_sha256
    with pytest.raises(Stop):
        run(tiny, tmp_path / "cut", progress=stop_after(after))
    again = run(tiny, tmp_path / "cut")
    assert again.resumed == (after >= 2)
    assert again.adapter_sha256 == whole


def test_sigkill_at_any_step_then_resume_gives_the_undisturbed_adapter(tiny, tmp_path):
    """A real child process, two threads, a real key; killed hard three times on its way through one round."""
    folder = tmp_path / "killed"
    folder.mkdir()
    shutil.copytree(tiny.path, folder / "model")
    (folder / "plan.json").write_text(json.dumps(plan(tiny, noise_source="system", steps=8).as_json()))
    RoundKey.create(folder / "round.key")
    shutil.copytree(folder, tmp_path / "whole")
    undisturbed = finish(child(tmp_path / "whole"))
    assert not undisturbed["resumed"]
    for step in (1, 4, 7):
        process = child(folder)
        for line in process.stdout:
            if line.startswith(f"{step}/"):
                process.kill()
                break
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    resumed = finish(child(folder))
    assert resumed == {"sha256": undisturbed["sha256"], "resumed": True}


def child(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "tests.learner.round_child", str(folder), "2"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 0
    return json.loads(lines[-1])


def test_a_second_round_starts_from_its_parent(tiny, tmp_path):
    first = run(tiny, tmp_path / "1")
    second = plan(tiny, round_id="r2", parent_sha256=first.adapter_sha256)
    output = run(tiny, tmp_path / "2", second, parent_dir=first.adapter_dir)
    parent, mine = read_adapter(first.adapter_dir).weights, read_adapter(output.adapter_dir).weights
    moved = max(float((mine[name] - parent[name]).abs().max()) for name in parent)
    assert moved == pytest.approx(output.max_abs_delta)
    # six AdamW steps at 1e-2: near its parent, while fresh A matrices differ by their whole range
    assert moved < 6 * 1e-2 * 1.5


EVERYTHING = LoraSettings(
    r=2,
    layers=2,
    targets=("q_proj", "down_proj", "lm_head"),
    rank_pattern={"layers.2.*": 3},
    alpha_pattern={"q_proj": 5},
    bottleneck=2,
    bottleneck_places=("attention", "mlp"),
)


def test_a_round_over_every_kind_of_weight_ends_in_an_adapter_the_next_one_starts_from(tiny, tmp_path):
    first = run(tiny, tmp_path / "1", plan(tiny, lora=EVERYTHING))
    second = plan(tiny, round_id="r2", parent_sha256=first.adapter_sha256, lora=EVERYTHING)
    output = run(tiny, tmp_path / "2", second, parent_dir=first.adapter_dir)
    parent, mine = read_adapter(first.adapter_dir, base=tiny), read_adapter(output.adapter_dir, base=tiny)
    assert parent.weights.keys() == mine.weights.keys()
    for name, weight in mine.weights.items():
        assert 0 < float((weight - parent.weights[name]).abs().max()) < 6 * 1e-2 * 1.5
    assert mine.max_abs_delta(parent) > 0
    other = EVERYTHING.model_copy(update={"nonlinearity": "silu"})
    third = plan(tiny, round_id="r3", parent_sha256=output.adapter_sha256, lora=other)
    with pytest.raises(AdapterError, match="nonlinearity=relu, must be silu"):
        _start(third, tiny, output.adapter_dir, Speed(), "fp32")


def test_running_layers_again_changes_no_bit_of_a_round(tiny, tmp_path):
    whole = run(tiny, tmp_path / "1").adapter_sha256
    again = run(tiny, tmp_path / "2", speed=Speed(checkpoint_steps=2, recompute="reentrant"))
    assert again.adapter_sha256 == whole


def test_a_resumed_round_keeps_the_precision_it_began_with(tiny, tmp_path):
    half = Speed(checkpoint_steps=2, precision="bf16")
    whole = run(tiny, tmp_path / "whole", speed=half).adapter_sha256
    with pytest.raises(Stop):
        run(tiny, tmp_path / "cut", speed=half, progress=stop_after(3))
    assert run(tiny, tmp_path / "cut", speed=Speed(checkpoint_steps=2)).adapter_sha256 == whole
    assert run(tiny, tmp_path / "fp32", speed=Speed(checkpoint_steps=2)).adapter_sha256 != whole


def test_a_probe_decides_for_real_noise_and_test_noise_stays_repeatable(tiny, monkeypatch):
    monkeypatch.setattr(learner.round, "probe", lambda: {"fp32": 1.0, "bf16": 0.2, "fp16": 0.2})
    assert _precision("auto", plan(tiny)) == "fp32"
    real = plan(tiny, noise_source="system")
    assert [_precision(asked, real) for asked in ("auto", "fp32", "fp16")] == ["bf16", "fp32", "fp16"]


def test_a_parent_of_another_shape_or_scale_is_refused(tiny, tmp_path):
    first = run(tiny, tmp_path / "1")
    for kind in (
        LoraSettings(r=8, layers=2),
        LoraSettings(r=4, layers=1),
        LoraSettings(r=4, layers=2, alpha=7),
        LoraSettings(r=4, layers=2, alpha_pattern={"layers.2.self_attn.q_proj": 7}),
        LoraSettings(r=4, layers=2, rank_pattern={"o_proj": 2}),
        LoraSettings(r=4, layers=2, bottleneck=2),
    ):
        other = plan(tiny, parent_sha256=first.adapter_sha256, lora=kind)
        with pytest.raises(AdapterError, match="parent adapter"):
            _start(other, tiny, first.adapter_dir, Speed(), "fp32")


@pytest.mark.parametrize(
    ("changes", "arguments", "match"),
    [
        ({"base_sha256": "0" * 64}, {}, "base_sha256"),
        ({"parent_sha256": "0" * 64}, {}, "parent_sha256"),
        ({"code_sha256": "0" * 64}, {}, "code_sha256"),
        ({"noise_source": "system"}, {}, "noise_source"),
        ({"blocks": (BlockRate(id="elsewhere", q=0.3),)}, {}, "block elsewhere"),
    ],
)
def test_what_does_not_belong_to_the_plan_is_refused(tiny, tmp_path, changes, arguments, match):
    with pytest.raises(RoundError, match=match):
        run(tiny, tmp_path, plan(tiny, **changes), **arguments)


def test_an_accountant_that_disagrees_stops_the_round_before_it_reads_a_record(tiny, tmp_path, monkeypatch):
    import learner.crosscheck

    class Untouchable(dict):
        def __getitem__(self, name):
            raise AssertionError("a private byte was read")

    monkeypatch.setattr(learner.crosscheck, "rdp", lambda *args: tuple(1.001 * v for v in real(*args)))
    from privacy.accounting import rdp as real

    with pytest.raises(RoundError, match="Opacus says"):
        run(tiny, tmp_path, records=Untouchable(b1=[], b2=[]))


def test_a_checkpoint_of_other_data_plan_rendering_or_code_is_not_resumed(tiny, tmp_path):
    with pytest.raises(Stop):
        run(tiny, tmp_path, progress=stop_after(3))
    less = blocks()
    less["b1"] = less["b1"][1:]
    with pytest.raises(ResumeRefused, match="data_sha256"):
        run(tiny, tmp_path, records=less)
    with pytest.raises(ResumeRefused, match="data_sha256"):
        run(tiny, tmp_path, records={"b1": blocks()["b1"][:-1], "b2": [blocks()["b1"][-1], *blocks()["b2"]]})
    with pytest.raises(ResumeRefused, match="data_sha256"):
        run(tiny, tmp_path, system="Be brief.")
    with pytest.raises(ResumeRefused, match="plan_sha256"):
        run(tiny, tmp_path, plan(tiny, sigma=0.9))
    with pytest.raises(ResumeRefused, match="code_sha256"):
        run(tiny, tmp_path, plan(tiny, code_sha256="0" * 64))


def test_a_round_whose_draws_are_all_empty_takes_every_step(tiny, tmp_path):
    seen = []
    rare = plan(tiny, blocks=(BlockRate(id="b1", q=1e-9), BlockRate(id="b2", q=1e-9)))
    output = run(tiny, tmp_path, rare, progress=lambda *args: seen.append(args))
    assert seen[-1] == (rare.steps, rare.steps)
    assert output.max_abs_delta > 0
    assert [charge.steps for charge in rare.charges()] == [6, 6]


def test_a_block_without_records_trains_on_noise(tiny, tmp_path):
    assert run(tiny, tmp_path, records={"b1": [], "b2": []}).max_abs_delta > 0


def test_users_are_a_unit_over_all_blocks(tiny, tmp_path):
    rates = (BlockRate(id="b1", q=0.3), BlockRate(id="b2", q=0.3))
    assert run(tiny, tmp_path, plan(tiny, unit="user", blocks=rates)).max_abs_delta > 0


def test_a_long_record_keeps_its_completion(tiny, tmp_path):
    from learner.round import _example
    from tests.learner.rounds import renderer_of

    record = records(1)[0]
    said = (renderer_of(tiny, ""), record.prompt, record.completion)
    whole = _example(*said, 1000)
    cut = _example(*said, len(whole.ids) - whole.completion_start + 3)
    assert cut.ids == whole.ids[-len(cut.ids) :]
    assert cut.ids[cut.completion_start :] == whole.ids[whole.completion_start :]
    tight = _example(*said, 1)
    assert tight.completion_start == 1


def test_peft_loads_the_adapter_and_gives_the_same_logits(tiny, tmp_path):
    from peft import PeftModel

    from learner.lora import LoraModel
    from learner.prefix import SplitModel, padded

    output = run(tiny, tmp_path)
    theirs = PeftModel.from_pretrained(load_model(tiny), output.adapter_dir)
    lora = LoraModel(load_model(tiny), plan(tiny).lora, 1)
    lora.load(read_adapter(output.adapter_dir).weights)
    halves = SplitModel(lora.model, lora.lowest)
    for example in examples(tiny, 3):
        ids = padded([example.ids])
        with torch.no_grad():
            positions = torch.arange(ids.shape[1])[None]
            ours = halves.norm(halves.upper(halves.lower(ids), positions)) @ halves.head.T
            torch.testing.assert_close(ours, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
            bare = load_model(tiny)(input_ids=ids).logits
        assert float((ours - bare).abs().max()) > 1e-2
