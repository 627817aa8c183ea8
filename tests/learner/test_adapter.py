"""Adapters on disk: peft reads what is written here, and nothing broken is read."""

import json
import shutil
import struct
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.adapter import adapter_sha256, read_adapter, weight_name, write_adapter
from learner.base import load_model
from learner.errors import AdapterError

# peft 0.21 asks transformers 5.24 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@dataclass(frozen=True)
class Settings:
    r: int = 4
    alpha: float = 8.0
    dropout: float = 0.0
    rslora: bool = False


SHAPES = {"q_proj": (32, 32), "v_proj": (16, 32), "down_proj": (32, 64), "gate_proj": (64, 32)}


def random_weights(layers=(1, 2), targets=("q_proj", "v_proj", "down_proj"), r=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in layers:
        for target in targets:
            out, inp = SHAPES[target]
            weights[weight_name(layer, target, "A")] = torch.randn(r, inp, generator=generator)
            weights[weight_name(layer, target, "B")] = torch.randn(out, r, generator=generator)
    return weights


@pytest.fixture
def adapter(tiny, tmp_path):
    write_adapter(tmp_path / "adapter", Settings(), random_weights(), tiny)
    return tmp_path / "adapter"


@pytest.mark.parametrize("settings", [Settings(), Settings(rslora=True)])
def test_peft_loads_it_unchanged(tiny, tmp_path, settings):
    from peft import PeftModel

    weights = random_weights()
    write_adapter(tmp_path / "a", settings, weights, tiny)
    scaling = read_adapter(tmp_path / "a", base=tiny).scaling
    ids = torch.tensor([[9707, 11, 1879, 0]])
    merged = load_model(tiny)
    with torch.no_grad():
        for (layer, target), out_in in [
            ((la, t), SHAPES[t]) for la in (1, 2) for t in ("q_proj", "v_proj", "down_proj")
        ]:
            block = merged.model.layers[layer]
            linear = getattr(block.self_attn if target in {"q_proj", "v_proj"} else block.mlp, target)
            a, b = (weights[weight_name(layer, target, m)] for m in "AB")
            assert linear.weight.shape == out_in
            linear.weight += scaling * b @ a
        expected = merged(ids).logits
        got = PeftModel.from_pretrained(load_model(tiny), tmp_path / "a")(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, load_model(tiny)(ids).logits, atol=1e-2)


def test_round_trip(tiny, adapter):
    read = read_adapter(adapter, tiny.sha256, base=tiny)
    assert (read.r, read.alpha, read.layers, read.base_sha256) == (4, 8.0, (1, 2), tiny.sha256)
    assert read.targets == ("down_proj", "q_proj", "v_proj")
    assert read.sha256 == adapter_sha256(adapter)
    weights = random_weights()
    assert weights.keys() == read.weights.keys()
    assert all(torch.equal(weights[name], read.weights[name]) for name in weights)


def test_the_same_weights_are_the_same_bytes_whatever_their_order(tiny, adapter, tmp_path):
    backwards = dict(reversed(random_weights().items()))
    assert write_adapter(tmp_path / "b", Settings(), backwards, tiny) == adapter_sha256(adapter)
    assert write_adapter(tmp_path / "b", Settings(), backwards, tiny) == adapter_sha256(adapter)


def test_another_adapter_is_not_overwritten(tiny, adapter):
    before = adapter_sha256(adapter)
    with pytest.raises(AdapterError, match="holds another adapter"):
        write_adapter(adapter, Settings(), random_weights(seed=1), tiny)
    assert adapter_sha256(adapter) == before
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def set_config(**changes):
    def harm(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


def set_weights(change):
    def harm(folder):
        path = folder / "adapter_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, path)

    return harm


def cut(count):
    def harm(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:count])

    return harm


Q = weight_name(1, "q_proj", "A")
HARMS = {
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
    "no weights": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors cannot be read",
    ),
    "no JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "is no JSON"),
    "not UTF-8": (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe"), "is no JSON"),
    "a list": (lambda d: (d / "adapter_config.json").write_text("[]"), "must be a JSON object"),
    "rank 0": (set_config(r=0), "r=0"),
    "rank of another": (set_config(r=8), r"shape=\(4, 64\), must be \(8, 64\)"),
    "no alpha": (set_config(lora_alpha=None), "lora_alpha=None"),
    "bias": (set_config(bias="all"), "bias='all'"),
    "saved modules": (set_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "dora": (set_config(use_dora=True), "use_dora"),
    "targets": (set_config(target_modules=["q_proj"]), "target_modules"),
    "target pattern": (set_config(target_modules=".*"), "target_modules"),
    "layers": (set_config(layers_to_transform=[0, 1]), "layers_to_transform"),
    "cut header": (cut(5), "header cannot be read"),
    "cut in the header": (cut(100), "header of"),
    "cut data": (cut(-4), "by its header"),
    "no bytes": (cut(0), "header cannot be read"),
    "nan": (set_weights(lambda w: w[Q].fill_(float("nan"))), "NaN or infinity"),
    "infinity": (set_weights(lambda w: w[Q].view(-1)[3].fill_(float("inf"))), "NaN or infinity"),
    "integers": (set_weights(lambda w: w.update({Q: w[Q].int()})), "must be floating point"),
    "missing pair": (set_weights(lambda w: w.pop(Q)), "is missing"),
    "transposed": (set_weights(lambda w: w.update({Q: w[Q].T})), "shape="),
    "one dimension": (set_weights(lambda w: w.update({Q: w[Q][0]})), "shape="),
    "a foreign tensor": (set_weights(lambda w: w.update({"lm_head.weight": w[Q]})), "lm_head.weight"),
    "a layer too many": (
        set_weights(lambda w: w.update({Q.replace("layers.1", "layers.9"): w[Q]})),
        "layer must be < 3",
    ),
    "nothing in it": (set_weights(lambda w: w.clear()), "has no weights"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_broken_adapter_is_refused_in_one_line(tiny, adapter, name):
    harm, message = HARMS[name]
    harm(adapter)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(adapter, base=tiny)
    assert "\n" not in str(caught.value)


def test_any_byte_cut_off_is_noticed(tiny, adapter):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(AdapterError):
            read_adapter(adapter, base=tiny)


def test_a_huge_header_length_is_not_read(tiny, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(AdapterError, match="header of"):
        read_adapter(adapter)


def test_a_huge_file_is_not_read(adapter):
    with pytest.raises(AdapterError, match="must be <= 100"):
        read_adapter(adapter, bytes_max=100)


def test_another_base_is_refused(tiny, adapter):
    with pytest.raises(AdapterError, match="base_sha256"):
        read_adapter(adapter, "0" * 64)
    assert read_adapter(adapter).base_sha256 == tiny.sha256


def test_writing_checks_too(tiny, tmp_path):
    weights = random_weights()
    weights[Q].fill_(float("nan"))
    with pytest.raises(AdapterError, match="NaN"):
        write_adapter(tmp_path / "a", Settings(), weights, tiny)
    with pytest.raises(AdapterError, match="shape="):
        write_adapter(tmp_path / "a", Settings(r=2), random_weights(), tiny)
    assert not list(tmp_path.iterdir())


def test_what_peft_saves_is_read(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "gate_proj"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, layers_to_transform=[2], task_type="CAUSAL_LM")
    get_peft_model(load_model(tiny), config).save_pretrained(tmp_path / "p")
    read = read_adapter(tmp_path / "p", base=tiny)
    assert (read.r, read.scaling, read.layers, read.targets) == (2, 2.0, (2,), ("gate_proj", "q_proj"))
    assert read.base_sha256 is None


def test_an_adapter_survives_a_copy(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "copy")
    assert adapter_sha256(tmp_path / "copy") == adapter_sha256(adapter)


def test_the_change_against_base_and_parent_is_measured(tiny, adapter, tmp_path):
    first = read_adapter(adapter, base=tiny)
    a, b = (first.weights[Q.replace("lora_A", f"lora_{m}")] for m in "AB")
    assert first.max_abs_delta() >= float((2 * b @ a).abs().max()) > 0
    assert first.max_abs_delta(first) == 0
    weights = random_weights() | random_weights(layers=(0,), targets=("q_proj", "v_proj", "down_proj"))
    weights[weight_name(0, "q_proj", "A")] *= 1000
    write_adapter(tmp_path / "next", Settings(), weights, tiny)
    second = read_adapter(tmp_path / "next", base=tiny)
    a, b = (second.weights[weight_name(0, "q_proj", m)] for m in "AB")
    assert second.max_abs_delta(first) == first.max_abs_delta(second) == float((2 * (b @ a)).abs().max())
    untrained = {name: w * ("lora_A" in name) for name, w in random_weights().items()}
    write_adapter(tmp_path / "zero", Settings(), untrained, tiny)
    assert read_adapter(tmp_path / "zero").max_abs_delta() == 0
