"""One training step as each library takes it, each way in a process of its own; bench/learner.py compares them.

A way is given the same records, the same LoRA targets and the same number of records a step. It is built, warmed up on
two records, and then takes a step whenever it is told to on standard input; it answers with the CPU time of the step.
Its last answer is its memory: the peak of what was resident (VmHWM) less what was resident when the libraries were
imported and the base was loaded, so that adapter, buffers, activations, logits and optimiser count, and nothing else.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from learner.adapter import BLOCK_PART
from learner.base import Base, load_model, load_tokenizer
from learner.lora import LoraModel
from learner.optimiser import FlatAdamW
from learner.plan import LoraSettings, OptimiserSettings
from learner.prefix import PrefixCache, SplitModel, padded
from learner.round import Speed
from learner.sampling import Unit, split
from learner.step import Example, Limits, Mechanism, PrivateStep, completions, loss_gradient
from privacy.randomness import KeyedStream, TestKey

OPTIMISER = OptimiserSettings()
# Rows of a physical batch of the peers: more of them pad more, fewer make thinner products.
PEER_ROWS = 16
IGNORED = -100  # the label that every library leaves out of the loss


@dataclass(frozen=True)
class Task:
    """What is the same for every way: one pass over `examples` is len(examples) / batch steps."""

    base: Base
    settings: LoraSettings
    examples: tuple[Example, ...]
    batch: int

    @property
    def draws(self) -> list[range]:
        """Records of each step of a pass."""
        return [range(i, i + self.batch) for i in range(0, len(self.examples), self.batch)]


Wait = Callable[[], bool]
"""Called before each step: tells what the last one took, waits for the word to go on, answers whether it came."""


# --- ours


def default_limits(width: int) -> Limits:
    """The physical batches that a round has by default, for this many trained weights."""
    speed = Speed()
    return Limits(speed.tokens_max, max(1, min(speed.rows_max, speed.buffer_bytes_max // (4 * width))))


class Ours:
    """The product's private step; `prefix_bytes` of inputs of the lowest adapted layer are kept."""

    def __init__(self, task: Task, model: Any, prefix_bytes: int = 0) -> None:
        limits = default_limits(LoraModel.width(model, task.settings))
        lora = self.lora = LoraModel(model, task.settings, limits.rows_max)
        lora.start_fresh(1)
        halves = SplitModel(lora.model, lora.layers[0])
        self._cache = PrefixCache(halves, [e.ids for e in task.examples], prefix_bytes)
        self._records = len(task.examples)
        mechanism = Mechanism(1.0, 1.0, task.batch)
        # Rate 1: the step draws exactly the records that the other ways see.
        self.steps = [
            PrivateStep(lora, halves, self._cache, task.examples, [Unit(1.0, (i,)) for i in draw], mechanism, limits)
            for draw in task.draws
        ]
        self._optimiser = FlatAdamW(lora.theta, OPTIMISER, 1000)

    def fill(self) -> None:
        self._cache.fill(range(self._records), Speed().tokens_max)

    def warm_up(self) -> None:
        self.steps[0].clipped_sum([0, 1], KeyedStream(TestKey(1), {"plan": "warm up"}, 0))

    def run(self, wait: Wait) -> None:
        for number in endless():
            if not wait():
                return
            stream = KeyedStream(TestKey(1), {"plan": "bench"}, number)
            self._optimiser.step(self.steps[number % len(self.steps)].gradient(stream), number)


class _Product(torch.autograd.Function):
    """LoRA with the gradient of the whole batch: the product's forward and backward, but one sum for all samples."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, layer: FusedLora) -> Tensor:  # noqa: ARG004 - autograd looks at it
        flat = x.reshape(-1, x.shape[2])
        weight, bias = layer.base.weight, layer.base.bias
        out = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
        low = (flat @ layer.a.t()).mul_(layer.scale)
        out.addmm_(low, layer.b.t())
        ctx.layer = layer
        ctx.save_for_backward(flat, low)
        return out.view(*x.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None, None]:
        layer = ctx.layer
        flat, low = ctx.saved_tensors
        grad = grad_out.reshape(len(flat), -1)
        grad_low = (grad @ layer.b).mul_(layer.scale)
        layer.grad_a.addmm_(grad_low.t(), flat)
        layer.grad_b.addmm_(grad.t(), low)
        if not ctx.needs_input_grad[1]:
            return None, None, None
        grad_x = (grad_low @ layer.a).addmm_(grad, layer.base.weight)
        return None, grad_x.view(*grad_out.shape[:2], -1), None


class FusedLora(nn.Module):
    """A frozen linear layer with LoRA matrices that are views of one flat vector, as are their gradients."""

    def __init__(
        self, base: nn.Linear, settings: LoraSettings, theta: Tensor, gradient: Tensor, anchor: Tensor
    ) -> None:
        super().__init__()
        self.base, self.scale, self.anchor = base, settings.scale, anchor
        cut, shape_a, shape_b = settings.r * base.in_features, (settings.r, -1), (-1, settings.r)
        self.a, self.b = theta[:cut].view(shape_a), theta[cut:].view(shape_b)
        self.grad_a, self.grad_b = gradient[:cut].view(shape_a), gradient[cut:].view(shape_b)
        self.a.normal_().div_(base.in_features**0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(self.anchor, x, self)  # type: ignore[no-untyped-call]
        return out


class OurPlain:
    """The same buckets, fused product, completion-only logits, short last layer and flat AdamW, without privacy."""

    def __init__(self, task: Task, model: Any) -> None:
        width = LoraModel.width(model, task.settings)
        self.theta, self.gradient = torch.zeros(width), torch.zeros(width)
        anchor, start = torch.zeros(0, requires_grad=True), 0
        indices = task.settings.layer_indices(len(model.model.layers))
        for index in indices:
            for target in task.settings.targets:
                part = getattr(model.model.layers[index], BLOCK_PART[target])
                linear = getattr(part, target)
                cut = slice(start, start + task.settings.r * (linear.in_features + linear.out_features))
                setattr(part, target, FusedLora(linear, task.settings, self.theta[cut], self.gradient[cut], anchor))
                start = cut.stop
        self._task = task
        self._halves = SplitModel(model, indices[0])
        self._lengths = [len(e.ids) for e in task.examples]
        self._units = [Unit(1.0, (i,)) for i in range(len(task.examples))]
        self._limits = default_limits(width)
        self._optimiser = FlatAdamW(self.theta, OPTIMISER, 1000)

    def warm_up(self) -> None:
        self.backward([0, 1])

    def run(self, wait: Wait) -> None:
        for number in endless():
            if not wait():
                return
            self.gradient.zero_()
            draw = self._task.draws[number % len(self._task.draws)]
            limits = self._limits
            for batch in split(
                draw, self._units, self._lengths, tokens_max=limits.tokens_max, rows_max=limits.rows_max
            ):
                self.backward(batch.examples)
            self._optimiser.step(self.gradient, number)

    def backward(self, indices: Sequence[int]) -> None:
        made = [self._task.examples[i] for i in indices]
        row, column, position, target, weight = completions(made)
        positions = torch.zeros(len(made), int(column.max()) + 1, dtype=torch.long)
        positions[row, column] = position
        hidden = self._halves.upper(self._halves.lower(padded([e.ids for e in made])), positions)
        normed = self._halves.norm(hidden[row, column])
        normed.backward(loss_gradient(normed.detach(), self._halves.head, target, weight / self._task.batch))


# --- peers


def peft_model(task: Task, model: Any) -> Any:
    """The targets and layers of the task under peft."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=task.settings.r,
        lora_alpha=task.settings.alpha,
        target_modules=list(task.settings.targets),
        layers_to_transform=list(task.settings.layer_indices(len(model.model.layers))),
        layers_pattern="layers",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).train()


def labelled(task: Task) -> list[dict[str, list[int]]]:
    """Token ids, with labels on the completion only."""
    return [
        {
            "input_ids": list(e.ids),
            "labels": [IGNORED] * e.completion_start + list(e.ids[e.completion_start :]),
        }
        for e in task.examples
    ]


class HfTrainer:
    """transformers' Trainer on a peft model: its own sampler, collator, clipping; no evaluation, logging or saving."""

    def __init__(self, task: Task, model: Any, strategy: str = "random") -> None:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        arguments = TrainingArguments(train_sampling_strategy=strategy, **self._arguments(task))
        self._trainer = Trainer(
            peft_model(task, model),
            arguments,
            DataCollatorForSeq2Seq(load_tokenizer(task.base)),
            labelled(task),
        )

    @staticmethod
    def _arguments(task: Task) -> dict[str, Any]:
        return {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": PEER_ROWS,
            "gradient_accumulation_steps": task.batch // PEER_ROWS,
            "learning_rate": OPTIMISER.learning_rate,
            "max_steps": 1000,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "eval_strategy": "no",
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }

    def warm_up(self) -> None:
        model = self._trainer.model
        batch = self._trainer.data_collator([self._trainer.train_dataset[i] for i in range(2)])
        model(**batch).loss.backward()
        model.zero_grad()

    def run(self, wait: Wait) -> None:
        from transformers import TrainerCallback

        class Turns(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
                control.should_training_stop = not wait()

            on_step_end = on_train_begin

        self._trainer.add_callback(Turns())
        self._trainer.train()


class TrlTrainer(HfTrainer):
    """TRL's SFTTrainer on the same labels, in random order; gradient checkpointing and bf16, its defaults, are off."""

    def __init__(self, task: Task, model: Any) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **self._arguments(task))
        self._trainer = SFTTrainer(
            peft_model(task, model),
            arguments,
            train_dataset=Dataset.from_list(labelled(task)),
            processing_class=load_tokenizer(task.base),
        )


class Opacus:
    """Opacus' GradSampleModule and DPOptimizer on a peft model, physical batches as its BatchMemoryManager has them."""

    def __init__(self, task: Task, model: Any) -> None:
        self._task = task
        self._data = labelled(task)
        self._wrap(peft_model(task, model))

    def _wrap(self, model: Any) -> None:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        self._model = GradSampleModule(model)
        self._optimiser = DPOptimizer(self._adamw(model), **self._mechanism())

    def _adamw(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=OPTIMISER.learning_rate)

    def _mechanism(self) -> dict[str, Any]:
        return {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": self._task.batch}

    def _logits(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, T-1, V) logits and (B, T-1) labels."""
        ids = padded([self._data[i]["input_ids"] for i in indices])
        labels = torch.full_like(ids, IGNORED)
        for row, i in enumerate(indices):
            labels[row, : len(self._data[i]["labels"])] = torch.tensor(self._data[i]["labels"])
        # Opacus takes the batch from the first dimension of what each layer sees, so positions must be per row.
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
        logits = self._model(input_ids=ids, position_ids=positions, use_cache=False).logits
        return logits[:, :-1], labels[:, 1:]

    def _backward(self, indices: Sequence[int]) -> None:
        logits, labels = self._logits(indices)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        (losses / (labels != IGNORED).sum(1)).mean().backward()

    def warm_up(self) -> None:
        self._backward([0, 1])
        self._optimiser.zero_grad()

    def run(self, wait: Wait) -> None:
        for number in endless():
            if not wait():
                return
            draw = self._task.draws[number % len(self._task.draws)]
            for first in range(0, len(draw), PEER_ROWS):
                self._optimiser.signal_skip_step(first + PEER_ROWS < len(draw))
                self._backward(draw[first : first + PEER_ROWS])
                self._optimiser.step()
                self._optimiser.zero_grad()


class OpacusGhost(Opacus):
    """Opacus' ghost clipping: norms without per-sample gradients, then a second backward pass."""

    def _wrap(self, model: Any) -> None:
        from opacus import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self._model = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0)
        self._optimiser = DPOptimizerFastGradientClipping(self._adamw(model), **self._mechanism())
        self._loss = DPLossFastGradientClipping(self._model, self._optimiser, nn.CrossEntropyLoss(ignore_index=IGNORED))

    def _backward(self, indices: Sequence[int]) -> None:
        logits, labels = self._logits(indices)
        self._loss(logits.flatten(0, 1), labels.flatten(), shape=logits.shape).backward()


WAYS: dict[str, Callable[[Task, Any], Any]] = {
    "private": Ours,
    "own_plain": OurPlain,
    "prefix": lambda task, model: Ours(task, model, prefix_bytes=Speed().prefix_bytes_max),
    "trainer": HfTrainer,
    "grouped_trainer": lambda task, model: HfTrainer(task, model, "group_by_length"),
    "trl": TrlTrainer,
    "opacus_hooks": Opacus,
    "opacus_ghost": OpacusGhost,
}
_IMPORTS = {"trl": "trl.trainer.sft_trainer datasets", "opacus": "opacus", "trainer": "transformers.trainer"}


# --- the process of one way


def endless() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; the bench runs on Linux")


def serve(order: dict[str, Any]) -> None:
    """Build the way that is asked for, then step when told to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(**fact: float) -> None:
        answers.write(json.dumps(fact) + "\n")
        answers.flush()

    warnings.filterwarnings("ignore")
    torch.manual_seed(1)
    torch.set_num_threads(1)
    for part, modules in _IMPORTS.items():
        if part in order["way"]:
            for module in modules.split():
                __import__(module)
    base = Base(Path(order["base"]), "", order["base"], "", {})
    examples = tuple(Example(tuple(ids), start) for ids, start in order["examples"])
    task = Task(base, LoraSettings(layers=order["layers"]), examples, order["batch"])
    model = load_model(base)
    for parameter in model.parameters():
        parameter.sum()  # weights are mapped from their file: all of them are resident from here on
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of imports and loading
    loaded = resident_bytes("VmRSS")
    way = WAYS[order["way"]](task, model)
    way.warm_up()
    fill_s = 0.0
    if order["way"] == "prefix":
        begin = time.process_time()
        way.fill()
        fill_s = time.process_time() - begin
    answer(fill_s=fill_s)
    begin = None

    def wait() -> bool:
        nonlocal begin
        if begin is not None:
            answer(cpu_s=time.process_time() - begin)
        told = sys.stdin.readline().strip() == "step"
        begin = time.process_time()
        return told

    way.run(wait)
    answer(memory_bytes=resident_bytes("VmHWM") - loaded)
    os._exit(0)  # taking the libraries down in order takes seconds


if __name__ == "__main__":
    serve(json.loads(sys.stdin.readline()))
