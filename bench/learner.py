"""One training step, five ways, on the same records and LoRA targets: CPU time, interleaved, medians with their spread.

`make bench-learner` prints a table and writes bench/results/learner.json. Ratios are what to look at: a shared machine
moves all five together. One thread, because a waiting OpenMP thread burns CPU time that no step asked for.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Python puts this folder first, where this very file would stand in for the package `learner`.
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from torch import nn  # noqa: E402

from learner.adapter import BLOCK_PART  # noqa: E402
from learner.base import EMBEDDED, Base, load_model, load_tokenizer, prepare_base  # noqa: E402
from learner.lora import LoraModel  # noqa: E402
from learner.optimiser import FlatAdamW  # noqa: E402
from learner.plan import LoraSettings, OptimiserSettings  # noqa: E402
from learner.prefix import PrefixCache, SplitModel, padded  # noqa: E402
from learner.prompt import Renderer  # noqa: E402
from learner.sampling import Unit, split  # noqa: E402
from learner.step import Example, Limits, Mechanism, PrivateStep, completions, loss_gradient  # noqa: E402
from privacy.randomness import KeyedStream, TestKey  # noqa: E402
from tests.tiny import tiny_base  # noqa: E402

ROWS = 32
LIMITS = Limits(tokens_max=1024, rows_max=16)
REPEATS = {"tiny": 7, "135M": 4}
OPTIMISER = OptimiserSettings()
SENTENCES = (
    "where is my new card",
    "i was charged twice for the same order, can you check what happened and refund one of them please",
    "freeze my account",
    "what is the exchange rate for euros at the moment and is there a fee for paying abroad",
    "my transfer has not arrived after three days",
    "change the pin",
    "how do i close the joint account that i opened with my brother last summer",
    "is there a limit on how much cash i can take out in a day",
)


class Ours:
    """The product's step, with or without the prefix cache."""

    def __init__(self, base: Base, made: list[Example], settings: LoraSettings, *, cached: bool) -> None:
        lora = LoraModel(load_model(base), settings, LIMITS.rows_max)
        lora.start_fresh(1)
        halves = SplitModel(lora.model, lora.layers[0])
        cache = PrefixCache(halves, [e.ids for e in made], (1 << 30) if cached else 0)
        cache.fill(range(len(made)), LIMITS.tokens_max)
        units = [Unit(1.0, (i,)) for i in range(len(made))]  # rate 1: everybody draws the same records
        self._step = PrivateStep(lora, halves, cache, made, units, Mechanism(1.0, 1.0, len(made)), LIMITS)
        self._optimiser = FlatAdamW(lora.theta, OPTIMISER, 100)
        self._number = 0

    def __call__(self) -> None:
        stream = KeyedStream(TestKey(1), {"plan": "bench"}, self._number)
        self._optimiser.step(self._step.gradient(stream), self._number)
        self._number += 1


class PlainLora(nn.Module):
    """LoRA by plain autograd: one gradient for the whole batch."""

    def __init__(self, base: nn.Linear, settings: LoraSettings) -> None:
        super().__init__()
        self.base, self.scale = base, settings.scale
        self.a = nn.Parameter(torch.randn(settings.r, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, settings.r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scale * (x @ self.a.T) @ self.b.T


class OursPlain:
    """The same buckets, completion-only logits and split model, but no per-sample gradients, clip or noise."""

    def __init__(self, base: Base, made: list[Example], settings: LoraSettings) -> None:
        model = load_model(base)
        indices = settings.layer_indices(len(model.model.layers))
        for index in indices:
            for target in settings.targets:
                part = getattr(model.model.layers[index], BLOCK_PART[target])
                setattr(part, target, PlainLora(getattr(part, target), settings))
        self._made = made
        self._halves = SplitModel(model, indices[0])
        self._units = [Unit(1.0, (i,)) for i in range(len(made))]
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(parameters, lr=OPTIMISER.learning_rate)

    def __call__(self) -> None:
        self._optimiser.zero_grad()
        lengths = [len(e.ids) for e in self._made]
        every = range(len(self._made))
        for batch in split(every, self._units, lengths, tokens_max=LIMITS.tokens_max, rows_max=LIMITS.rows_max):
            made = [self._made[i] for i in batch.examples]
            row, column, position, target, weight = completions(made)
            positions = torch.zeros(len(made), int(column.max()) + 1, dtype=torch.long)
            positions[row, column] = position
            hidden = self._halves.upper(self._halves.lower(padded([e.ids for e in made])), positions)
            normed = self._halves.norm(hidden[row, column])
            normed.backward(loss_gradient(normed.detach(), self._halves.head, target, weight / len(self._made)))
        self._optimiser.step()


class Peft:
    """A peft model in record order with full logits, as a training loop without privacy has it."""

    def __init__(self, base: Base, made: list[Example], settings: LoraSettings) -> None:
        from peft import LoraConfig, get_peft_model

        model = load_model(base)
        config = LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            target_modules=list(settings.targets),
            layers_to_transform=list(settings.layer_indices(len(model.model.layers))),
            layers_pattern="layers",
        )
        self._model = self._wrap(get_peft_model(model, config).train())
        self._batches = [self._batch(made[i : i + LIMITS.rows_max]) for i in range(0, len(made), LIMITS.rows_max)]
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._parameters, lr=OPTIMISER.learning_rate)

    def _wrap(self, model: nn.Module) -> nn.Module:
        return model

    @staticmethod
    def _batch(made: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = padded([e.ids for e in made])
        labels = torch.full_like(ids, -100)
        for i, e in enumerate(made):
            labels[i, e.completion_start : len(e.ids)] = ids[i, e.completion_start : len(e.ids)]
        return ids, labels

    def _backward(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
        logits = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        (losses / (labels != -100).sum(1)).sum().backward()

    def __call__(self) -> None:
        self._optimiser.zero_grad()
        for ids, labels in self._batches:
            self._backward(ids, labels)
        self._optimiser.step()


class Opacus(Peft):
    """The same under Opacus' hooks, with a flat clip of 1 and Gaussian noise."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        from opacus import GradSampleModule

        wrapped: nn.Module = GradSampleModule(model, loss_reduction="sum")
        return wrapped

    def __call__(self) -> None:
        total = [torch.zeros_like(p) for p in self._parameters]
        for ids, labels in self._batches:
            self._backward(ids, labels)
            squares = sum(p.grad_sample.flatten(1).square().sum(1) for p in self._parameters)
            factor = (1.0 / (squares.sqrt() + 1e-6)).clamp(max=1.0)
            for part, p in zip(total, self._parameters, strict=True):
                part.add_(torch.einsum("i,i...->...", factor, p.grad_sample))
                p.grad_sample = p.grad = None
        for part, p in zip(total, self._parameters, strict=True):
            p.grad = (part + torch.randn_like(part)) / ROWS
        self._optimiser.step()


def examples(base: Base) -> list[Example]:
    renderer = Renderer(load_tokenizer(base), "")
    made = []
    for i in range(ROWS):
        ids, start = renderer.example(SENTENCES[i % len(SENTENCES)], SENTENCES[(3 * i) % len(SENTENCES)][:14])
        made.append(Example(tuple(ids), start))
    return made


def measure(base: Base, settings: LoraSettings, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each step, all ways in turn; the first turn warms up and is not counted."""
    made = examples(base)
    ways = {
        "ours_private_prefix_cached": Ours(base, made, settings, cached=True),
        "ours_private": Ours(base, made, settings, cached=False),
        "ours_plain": OursPlain(base, made, settings),
        "peft_plain": Peft(base, made, settings),
        "opacus_hooks": Opacus(base, made, settings),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if turn:
                spent[name].append(time.process_time() - begin)
    return spent


def ratios(spent: dict[str, list[float]]) -> dict[str, float]:
    """Figures by name: medians of the ratios within one turn, and their spread (half the range)."""
    figures = {}
    pairs = {
        "private_over_own_plain": ("ours_private", "ours_plain"),
        "private_over_peft_plain": ("ours_private", "peft_plain"),
        "private_over_opacus_hooks": ("ours_private", "opacus_hooks"),
        "cached_over_peft_plain": ("ours_private_prefix_cached", "peft_plain"),
        "opacus_hooks_over_peft_plain": ("opacus_hooks", "peft_plain"),
    }
    for name, (upper, lower) in pairs.items():
        each = [a / b for a, b in zip(spent[upper], spent[lower], strict=True)]
        figures[name] = round(statistics.median(each), 3)
        figures[f"{name}_spread"] = round((max(each) - min(each)) / 2, 3)
    for name, seconds in spent.items():
        figures[f"{name}_cpu_s"] = round(statistics.median(seconds), 4)
    return figures


def main() -> None:
    import warnings

    # torch tells Opacus' users that the lowest hook sees no input gradient, which is right: what lies below is frozen.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        bases = {
            "tiny": (tiny_base(Path(folder)), LoraSettings(layers=1)),
            "135M": (prepare_base(EMBEDDED, ROOT / "workspace" / "bases"), LoraSettings(layers=6)),
        }
        for name, (base, settings) in bases.items():
            results[name] = ratios(measure(base, settings, REPEATS[name]))
    print(f"{'CPU time of one step of ' + str(ROWS) + ' records':44s}" + "".join(f"{name:>16s}" for name in results))
    for figure in (f for f in results["tiny"] if not f.endswith("_spread")):
        row = "".join(
            f"{r[figure]:>9.3f}" + (f" ± {r[f'{figure}_spread']:.2f}" if f"{figure}_spread" in r else " " * 7)
            for r in results.values()
        )
        print(f"{figure:44s}{row}")
    out = ROOT / "bench" / "results" / "learner.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
