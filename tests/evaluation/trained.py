"""Adapters really trained, in seconds: the tiny base learns to say a few completions word for word."""

from pathlib import Path

import torch

from learner.adapter import write_adapter
from learner.base import Base, load_model, load_tokenizer
from learner.layout import weight_name
from learner.plan import LoraSettings
from learner.prompt import Renderer

TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def train(
    base: Base, folder: Path, pairs, *, steps: int = 60, seed: int = 0, rate: float = 2e-2, enough: float = 0
) -> str:
    """Plain Adam on all pairs at once, through peft, until the loss is `enough`; the adapter's sha256."""
    from peft import LoraConfig, get_peft_model

    renderer = Renderer(load_tokenizer(base))
    model = load_model(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        tuned = get_peft_model(model, lora)
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=rate)
    examples = [renderer.example(*pair) for pair in pairs]
    for _ in range(steps):
        optimiser.zero_grad()
        whole = 0.0
        for ids, start in examples:
            kept = len(ids) - start
            logits = tuned(torch.tensor([ids[:-1]]), logits_to_keep=kept).logits[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])) / len(examples)
            loss.backward()
            whole += float(loss.detach())
        if whole < enough:
            break
        optimiser.step()
    return write_adapter(folder, LoraSettings(r=8, alpha=16.0), {n: w.detach() for n, w in matrices(tuned)}, base)


def matrices(tuned):
    """Every trained matrix of a peft model over a tiny base, by its name on disk."""
    for layer, module in enumerate(tuned.base_model.model.model.layers):
        for target in TARGETS:
            adapted = getattr(module.self_attn if target in {"q_proj", "v_proj"} else module.mlp, target)
            for letter in "AB":
                yield weight_name(layer, target, letter), getattr(adapted, f"lora_{letter}")["default"].weight
