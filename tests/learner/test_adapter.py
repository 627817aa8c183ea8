"""Adapters on disk: peft reads what is written here, and nothing broken is read."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from learner.adapter import Bottleneck, adapter_files, adapter_sha256, read_adapter, write_adapter
from learner.base import load_model
from learner.errors import AdapterError
from learner.layout import module_name, weight_name
from learner.lora import LoraModel
from learner.plan import LoraSettings

# peft 0.21 asks transformers 5.24 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def lora(**changes):
    return LoraSettings(**{"r": 4, "alpha": 8.0, **changes})


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
    write_adapter(tmp_path / "adapter", lora(), random_weights(), tiny)
    return tmp_path / "adapter"


RANKS = {
    "one rank": {},
    "rank-stabilised": {"rslora": True},
    "ranks by pattern": {"rank_pattern": {"layers.2.self_attn.q_proj": 7, "[qv]_proj": 2}},
    "both patterns, rank-stabilised": {
        "rslora": True,
        "rank_pattern": {"down_proj": 1},
        "alpha_pattern": {"layers.1.*": 3.0, "q_proj": 20},
    },
}
HEAD = ("lm_head",)


def untouched(tiny, settings, seed=0):
    """A LoRA model of these settings on the base, all its weights drawn."""
    made = LoraModel(load_model(tiny), settings, 1)
    made.theta.copy_(torch.randn(len(made.theta), generator=torch.Generator().manual_seed(seed)) * 0.1)
    return made


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), ("q_proj", "v_proj", "down_proj", *HEAD), HEAD])
@pytest.mark.parametrize("ranks", RANKS)
def test_peft_loads_it_unchanged(tiny, tmp_path, targets, ranks):
    """Against the sum written out by hand: the base, and in each adapted place its scale times B A."""
    from peft import PeftModel

    patterns = {} if targets == HEAD else RANKS[ranks]
    settings = lora(layers=2, targets=targets, **patterns)
    made = untouched(tiny, settings)
    write_adapter(tmp_path / "a", settings, made.weights(), tiny)
    ids = torch.tensor([[9707, 11, 1879, 0]])
    merged = load_model(tiny)
    with torch.no_grad():
        bare = merged(ids).logits
        merged.lm_head.weight = torch.nn.Parameter(merged.lm_head.weight.clone())  # no longer the embedding
        for a, b in zip(made.slots[::2], made.slots[1::2], strict=True):
            scale = settings.scale_of(module_name(a.layer, a.target))
            update = scale * made._view(b) @ made._view(a)
            merged.get_submodule(module_name(a.layer, a.target)).weight += update
        expected = merged(ids).logits
        got = PeftModel.from_pretrained(load_model(tiny), tmp_path / "a")(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, bare, atol=1e-2)


def test_patterns_mean_what_they_mean_to_peft(tiny, tmp_path):
    """peft's own configuration with patterns, saved by peft: read here, every module has peft's rank and scale."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2,
        lora_alpha=4,
        use_rslora=True,
        target_modules=["q_proj", "gate_proj", "o_proj"],
        rank_pattern={"layers.1.*": 3, "q_proj": 5, "^model.layers.0.mlp.gate_proj": 6},
        alpha_pattern={".*o_proj": 9, "gate_proj": 1.5},
    )
    model = get_peft_model(load_model(tiny), config)
    model.save_pretrained(tmp_path / "p")
    read = read_adapter(tmp_path / "p", base=tiny)
    assert len(list(read.places())) == 9
    for layer, target in read.places():
        theirs = model.get_submodule(f"base_model.model.{module_name(layer, target)}")
        assert read.weights[weight_name(layer, target, "A")].shape[0] == theirs.r["default"]
        assert read.scale_of(module_name(layer, target)) == theirs.scaling["default"]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_a_head_that_peft_saved_is_read_without_the_base_inside(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(tiny), config)
    model.save_pretrained(tmp_path / "lean", save_embedding_layers=False)
    read = read_adapter(tmp_path / "lean", base=tiny)
    assert (read.layers, read.targets, list(read.places())) == ((), ("lm_head",), [(-1, "lm_head")])
    model.save_pretrained(tmp_path / "fat")
    with pytest.raises(AdapterError, match="save_embedding_layers=False"):
        read_adapter(tmp_path / "fat", base=tiny)


WITH_BOTTLENECK = {"layers": 2, "targets": ("q_proj", "lm_head"), "bottleneck": 3, "nonlinearity": "silu"}


@pytest.fixture
def narrow(tiny, tmp_path):
    settings = lora(**WITH_BOTTLENECK, bottleneck_places=("mlp", "attention"))
    write_adapter(tmp_path / "narrow", settings, untouched(tiny, settings).weights(), tiny)
    return tmp_path / "narrow"


def test_bottlenecks_lie_beside_in_a_file_of_their_own_and_in_the_hash(tiny, narrow):
    assert {p.name for p in narrow.iterdir()} == set(adapter_files(narrow))
    assert len(adapter_files(narrow)) == 3
    read = read_adapter(narrow, base=tiny)
    assert read.bottleneck == Bottleneck(3, ("attention", "mlp"), "silu")
    assert list(read.bottlenecks()) == [(1, "attention"), (1, "mlp"), (2, "attention"), (2, "mlp")]
    settings = lora(**WITH_BOTTLENECK, bottleneck_places=("mlp", "attention"))
    weights = untouched(tiny, settings).weights()
    assert weights.keys() == read.weights.keys()
    assert all(torch.equal(weights[name], read.weights[name]) for name in weights)
    before = adapter_sha256(narrow)
    path = narrow / "bottleneck.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert adapter_sha256(narrow) != before
    path.unlink()
    with pytest.raises(AdapterError, match=r"bottleneck\.safetensors cannot be read"):
        adapter_sha256(narrow)


def test_peft_refuses_bottlenecks_instead_of_loading_half(tiny, narrow):
    from peft import PeftModel

    with pytest.raises(KeyError, match=r"bottleneck\.safetensors: only Tidegate's in-process engine has these"):
        PeftModel.from_pretrained(load_model(tiny), narrow)
    # What vLLM looks at before it loads: it takes no adapter that saves modules of its own.
    assert json.loads((narrow / "adapter_config.json").read_text())["modules_to_save"]


D = "bottleneck.layers.1.mlp.down"
NARROW_HARMS = {
    "lost": (lambda w: w.pop(D), f"{D}' in .*is missing"),
    "one more": (lambda w: w.update({"bottleneck.layers.0.mlp.down": w[D].clone()}), "layers.0.* is missing"),
    "a layer too many": (lambda w: w.update({D.replace("1", "7"): w[D].clone()}), "layers.7"),
    "another width": (lambda w: w.update({D: w[D][:2].clone()}), r"shape=\(2, 32\), must be \(3, 32\)"),
    "not finite": (lambda w: w[D].fill_(float("nan")), "NaN or infinity"),
    "of no place": (lambda w: w.update({D.replace("mlp", "norm"): w[D].clone()}), "norm"),
}


@pytest.mark.parametrize("name", NARROW_HARMS)
def test_a_broken_bottleneck_is_refused_in_one_line(tiny, narrow, name):
    change, message = NARROW_HARMS[name]
    path = narrow / "bottleneck.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(narrow, base=tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [3, {"width": 0, "places": ["mlp"], "nonlinearity": "relu"}, {"width": 3}, {}])
def test_a_bottleneck_that_says_nothing_sensible_is_refused(tiny, narrow, value):
    set_config(bottleneck=value)(narrow)
    with pytest.raises(AdapterError, match="bottleneck="):
        read_adapter(narrow, base=tiny)


def test_the_change_counts_heads_and_bottlenecks_too(tiny, narrow, tmp_path):
    read = read_adapter(narrow, base=tiny)
    assert read.max_abs_delta() > 0
    assert read.max_abs_delta(read) == 0
    settings = lora(**WITH_BOTTLENECK)
    for matrix in ("up", "up_bias", "down_bias", "B"):
        made = untouched(tiny, settings)
        first = write_adapter(tmp_path / matrix / "1", settings, made.weights(), tiny)
        slot = next(slot for slot in reversed(made.slots) if slot.matrix == matrix)
        made.theta[slot.start] += 0.5
        assert write_adapter(tmp_path / matrix / "2", settings, made.weights(), tiny) != first
        one, two = (read_adapter(tmp_path / matrix / number, base=tiny) for number in "12")
        assert two.max_abs_delta(one) > 0
    fresh = LoraModel(load_model(tiny), settings, 1)
    fresh.start_fresh(1)
    write_adapter(tmp_path / "fresh", settings, fresh.weights(), tiny)
    assert read_adapter(tmp_path / "fresh", base=tiny).max_abs_delta() == 0


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
    assert write_adapter(tmp_path / "b", lora(), backwards, tiny) == adapter_sha256(adapter)
    assert write_adapter(tmp_path / "b", lora(), backwards, tiny) == adapter_sha256(adapter)


def test_another_adapter_is_not_overwritten(tiny, adapter):
    before = adapter_sha256(adapter)
    with pytest.raises(AdapterError, match="holds another adapter"):
        write_adapter(adapter, lora(), random_weights(seed=1), tiny)
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
    "tied": (set_config(ensure_weight_tying=True), "ensure_weight_tying"),
    "rank 0 by pattern": (set_config(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\]=0"),
    "another rank by pattern": (set_config(rank_pattern={"q_proj": 2}), r"shape=\(4, 32\), must be \(2, 32\)"),
    "no expression": (set_config(alpha_pattern={"q_proj(": 2}), "no regular expression"),
    "an endless expression": (set_config(alpha_pattern={"(a|aa)+": 2}), "repeats a group"),
    "no alpha by pattern": (set_config(alpha_pattern={"q_proj": -1}), r"alpha_pattern\['q_proj'\]=-1"),
    "a list of patterns": (set_config(rank_pattern=[["q_proj", 2]]), "must be a JSON object"),
    "a bottleneck of the config alone": (
        set_config(bottleneck={"width": 2, "places": ["mlp"], "nonlinearity": "relu"}),
        "bottleneck.safetensors cannot be read",
    ),
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
    "half a head": (
        set_weights(lambda w: w.update({"base_model.model.lm_head.lora_A.weight": w[Q]})),
        "lm_head.lora_B.weight .*is missing",
    ),
    "the base's own weights": (
        set_weights(lambda w: w.update({"base_model.model.lm_head.base_layer.weight": w[Q]})),
        "save_embedding_layers=False",
    ),
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
        write_adapter(tmp_path / "a", lora(), weights, tiny)
    with pytest.raises(AdapterError, match="shape="):
        write_adapter(tmp_path / "a", lora(r=2), random_weights(), tiny)
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
    write_adapter(tmp_path / "next", lora(), weights, tiny)
    second = read_adapter(tmp_path / "next", base=tiny)
    a, b = (second.weights[weight_name(0, "q_proj", m)] for m in "AB")
    assert second.max_abs_delta(first) == first.max_abs_delta(second) == float((2 * (b @ a)).abs().max())
    untrained = {name: w * ("lora_A" in name) for name, w in random_weights().items()}
    write_adapter(tmp_path / "zero", lora(), untrained, tiny)
    assert read_adapter(tmp_path / "zero").max_abs_delta() == 0
