"""One private LoRA round: plan, base, parent and records in, one adapter out.

Loss, gradient norms and draw sizes are private and are neither computed for show, nor logged, nor returned. A round
that dies is run again with the same arguments: it continues from its checkpoint and ends in the same bytes. The ledger
is the caller's: it reserves and starts before, commits after, and destroys the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Literal

import structlog
import torch
from torch import Tensor

from learner.adapter import read_adapter, write_adapter
from learner.base import load_model, load_tokenizer
from learner.checkpoint import FILE, Checkpoint, load, save
from learner.continual import averaged, subspace
from learner.crosscheck import check_charges
from learner.errors import AdapterError, ResumeRefused, RoundError
from learner.layout import module_name
from learner.lora import LoraModel
from learner.optimiser import FlatAdamW, layer_rates
from learner.plan import code_sha256
from learner.precision import DTYPES, Precision, fastest, probe
from learner.prefix import PrefixCache, Recompute, Spill, SplitModel
from learner.prompt import Renderer
from learner.sampling import Unit, draw, gather
from learner.step import Example, Limits, Mechanism, NoMechanism, PrivateStep
from learner.stopping import Signal, Stopper, of_outcome
from privacy.canonical import sha256_of
from privacy.randomness import KeyedStream, RoundKey, TestKey

if TYPE_CHECKING:
    from pathlib import Path

    from ingest.record import Record
    from learner.base import Base
    from learner.plan import RoundPlan

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all), and nothing else: what a step looked like is private."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Speed:
    """What only speed and memory depend on. No value here changes what is computed, beyond the last bits of rounding.

    Attributes:
        threads: CPU threads; None keeps torch's. A resumed round uses those it began with.
        precision: of the frozen layers. "auto" takes what a probe of this machine speaks for, or fp32 under test noise,
            whose purpose is to repeat bit for bit elsewhere. A resumed round uses what it began with.
        recompute: whether backward runs layers again instead of keeping their activations.
        checkpoint_steps: a crash repeats at most this many steps.
        tokens_max: padded tokens in a physical batch: most of a step's memory is what their backward pass keeps.
        rows_max: examples in a physical batch, where the buffer allows it.
        buffer_bytes_max: memory of the per-sample gradients.
        prefix_bytes_max: memory of the prefix cache.
        prefix_disk_bytes_max: disk it may take besides, in the checkpoint's folder, all at once when memory is full.
            What fits neither is computed in every step.
        prefixes: prefixes kept over several rounds, see learner.prefix; None: the round keeps its own.
    """

    threads: int | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    recompute: Recompute = "none"
    checkpoint_steps: int = 5
    tokens_max: int = 1024
    rows_max: int = 32
    buffer_bytes_max: int = 256 << 20
    prefix_bytes_max: int = 2 << 30
    prefix_disk_bytes_max: int = 0
    prefixes: MutableMapping[tuple[int, ...], torch.Tensor] | None = None


@dataclass(frozen=True)
class RoundOutput:
    """What leaves a round."""

    adapter_dir: Path
    adapter_sha256: str
    resumed: bool
    max_abs_delta: float  # largest change of a weight against the parent; post-processing, so it may be shown
    steps: int  # taken: fewer than planned where the round stopped early, by a public signal


def run_round(
    plan: RoundPlan,
    *,
    base: Base,
    parent_dir: Path | None,
    records: Mapping[str, Sequence[Record]],
    key: RoundKey | TestKey,
    system: str | None,
    checkpoint_dir: Path,
    out_dir: Path,
    max_tokens: int,
    progress: Progress | None = None,
    speed: Speed | None = None,
    signal: Signal | None = None,
) -> RoundOutput:
    """Train one adapter under the plan, or continue where an interrupted run with the same arguments stopped.

    Args:
        plan: what is charged, and so what runs.
        base: the base model the plan names.
        parent_dir: the live adapter the plan names; None when the plan has no parent.
        records: training records per block of the plan; a mapping may load them on access.
        key: the round's key, a `TestKey` exactly when the plan says so.
        system: system prompt for rendering, as in serving.
        checkpoint_dir: this attempt's own folder.
        out_dir: becomes the adapter's folder.
        max_tokens: longer records lose the beginning of their prompt.
        progress: told at the start and after each step.
        speed: knobs without influence on the result.
        signal: the public set of the plan's early stopping, if it has any.

    Raises:
        RoundError: plan and arguments do not belong together, or nothing was learnt.
        ResumeRefused: a checkpoint exists, but plan, data, base or code have changed.
        AdapterError: the parent does not fit the plan's LoRA settings, or the result is not finite.
    """
    speed = speed or Speed()
    _check_arguments(plan, base, parent_dir, key, checkpoint_dir, signal)
    check_charges(plan)
    gathered, units = gather(plan.blocks, _complete(plan, records), plan.unit)
    data = _data_sha256(plan, gathered, units, system, max_tokens)
    context = {"plan": plan.plan_hash, "data": data, "base": base.sha256, "code": plan.code_sha256}
    found = load(checkpoint_dir, context)
    with _threads(found.threads if found else speed.threads or torch.get_num_threads()) as threads:
        renderer = Renderer(load_tokenizer(base), system)
        examples = _examples(plan, renderer, gathered, max_tokens)
        precision = found.precision if found else _precision(speed.precision, plan)
        lora = _start(plan, base, parent_dir, speed, precision)
        begin = lora.theta.clone()
        kept = plan.continual
        own = subspace(lora.slots, begin, plan.lora.r, kept.rank_groups) if kept.method == "orthogonal" else None
        streams = [KeyedStream(key, context, step) for step in range(plan.steps)]
        done = begun = found.step if found else 0
        optimiser = _continue(lora, plan, found)

        def outcome(theta: Tensor) -> Tensor:
            return averaged(begin, theta, kept.weight) if kept.method == "average" and parent_dir else theta

        score = signal.prepare(partial(_example, renderer, max_tokens=max_tokens)) if signal else None
        score = of_outcome(score, outcome) if score else None
        stopper = Stopper(plan.stopping, score, (found.stopping, found.best) if found else ("", None))

        def keep() -> None:
            if done % speed.checkpoint_steps == 0 or done == plan.steps or stopper.ended:
                moments = (optimiser.first, optimiser.second)
                state = Checkpoint(done, threads, precision, lora.theta, *moments, stopper.best, stopper.state)
                save(checkpoint_dir, state, context)
            if progress:
                progress(done, plan.steps)

        # Before the key is used, also when no step is done: from here on other data is another attempt. And somebody
        # waits: filling the prefix cache takes about as long as ten steps.
        keep()
        step = _private_step(plan, lora, examples, units, streams, speed, checkpoint_dir, own.mask if own else None)
        while done < plan.steps and not stopper.ended:
            optimiser.step(step.gradient(streams[done]), done)
            if own:
                own.hold(lora.theta)
            done += 1
            stopper.after(done, plan.steps, lora)
            keep()
        stopper.settle(lora)
        lora.theta.copy_(outcome(lora.theta))
    delta = _largest_change(lora, begin)
    digest = write_adapter(out_dir, plan.lora, lora.weights(), base)
    log.info("round trained", stream=plan.stream, round_id=plan.round_id, attempt=plan.attempt, steps=done)
    return RoundOutput(out_dir, digest, resumed=begun > 0, max_abs_delta=delta, steps=done)


def _check_arguments(
    plan: RoundPlan,
    base: Base,
    parent_dir: Path | None,
    key: RoundKey | TestKey,
    checkpoint_dir: Path,
    signal: Signal | None,
) -> None:
    """Refuse what does not belong to the plan, while nothing private has been read."""
    if plan.code_sha256 != code_sha256():
        kind = ResumeRefused if (checkpoint_dir / FILE).exists() else RoundError
        raise kind(f"code_sha256={code_sha256()}: must be {plan.code_sha256} as planned; start a new attempt")
    if base.sha256 != plan.base_sha256:
        raise RoundError(f"base_sha256={base.sha256}: must be {plan.base_sha256} as planned; start a new attempt")
    parent = read_adapter(parent_dir, base=base).sha256 if parent_dir else None
    if parent != plan.parent_sha256:
        raise RoundError(f"parent_sha256={parent}: must be {plan.parent_sha256} as planned; start a new attempt")
    source = "test" if isinstance(key, TestKey) else "system"
    # A round without privacy draws by a key of the system's: it resumes, and ends, as any other.
    if source != ("test" if plan.noise_source == "test" else "system"):
        raise RoundError(f"noise_source={plan.noise_source}: the key is for {source}; give the key that was planned")
    planned = plan.stopping.signal_sha256 if plan.stopping else None
    if planned != (signal.sha256 if signal else None):
        raise RoundError(f"stopping.signal_sha256={planned}: must be that of the signal; give the set that was planned")


def _complete(plan: RoundPlan, records: Mapping[str, Sequence[Record]]) -> Mapping[str, Sequence[Record]]:
    missing = [block.id for block in plan.blocks if block.id not in records]
    if missing:
        raise RoundError(f"records: block {missing[0]} of the plan is missing; pin the revision of the plan")
    return records


def _data_sha256(
    plan: RoundPlan, gathered: Sequence[Record], units: Sequence[Unit], system: str | None, max_tokens: int
) -> str:
    """Hash of all that examples and draws follow from. As secret as the data: it stays in checkpoint and key stream.

    Units count too: a record that moves to another block is drawn at another rate.
    """
    digest = sha256(sha256_of([plan.data_revision, system, max_tokens]).encode())
    for unit in units:
        digest.update(sha256_of([unit.q, list(unit.examples)]).encode())
    for record in gathered:
        weight = plan.weight_of(record.domain, record.label)
        digest.update(sha256_of([record.user_id, record.event_id, record.prompt, record.completion, weight]).encode())
    return digest.hexdigest()


def _examples(plan: RoundPlan, renderer: Renderer, gathered: Sequence[Record], max_tokens: int) -> list[Example]:
    """The records as token ids, each with the weight that the plan's declared priors give it."""
    made = [_example(renderer, record.prompt, record.completion, max_tokens) for record in gathered]
    weights = [plan.weight_of(record.domain, record.label) for record in gathered]
    return [replace(example, weight=weight) for example, weight in zip(made, weights, strict=True)]


def _example(renderer: Renderer, prompt: str, completion: str, max_tokens: int) -> Example:
    """Token ids, cut from the left: the completion's end is what must be learnt. One prompt token stays before it."""
    ids, start = renderer.example(prompt, completion)
    cut = max(0, len(ids) - max_tokens)
    return Example(tuple(ids[cut:]), max(1, start - cut))


def _precision(asked: Literal["auto", "fp32", "bf16", "fp16"], plan: RoundPlan) -> Precision:
    if asked != "auto":
        return asked
    if plan.noise_source == "test":
        return "fp32"
    chosen = fastest(probe())
    log.info("precision chosen", stream=plan.stream, precision=chosen)
    return chosen


def _start(plan: RoundPlan, base: Base, parent_dir: Path | None, speed: Speed, precision: Precision) -> LoraModel:
    """The model with the parent's weights, or with fresh ones under a public seed: the plan's hash."""
    model = load_model(base, DTYPES[precision])
    width = LoraModel.width(model, plan.lora)
    rows_max = max(1, min(speed.rows_max, speed.buffer_bytes_max // (4 * width)))
    lora = LoraModel(model, plan.lora, rows_max)
    if parent_dir is None:
        lora.start_fresh(int(plan.plan_hash[:15], 16))
        return lora
    parent = read_adapter(parent_dir, base=base)
    for slot in lora.slots:
        if slot.matrix != "A":
            continue
        module = module_name(slot.layer, slot.target)
        if parent.scale_of(module) != plan.lora.scale_of(module):
            raise AdapterError(
                f"parent adapter: scale={parent.scale_of(module)} of {module}, must be {plan.lora.scale_of(module)}; "
                "keep lora.alpha, r, their patterns and rslora"
            )
    if parent.bottleneck and parent.bottleneck.nonlinearity != plan.lora.nonlinearity:
        raise AdapterError(
            f"parent adapter: nonlinearity={parent.bottleneck.nonlinearity}, must be {plan.lora.nonlinearity}; keep it"
        )
    lora.load(parent.weights)
    return lora


def _largest_change(lora: LoraModel, begin: Tensor) -> float:
    """max|delta| over all weights, of which every adapted place must have moved some.

    Noise moves what no gradient reaches, too; that each place is reached is `learner.gradients`' to check, every pass.
    """
    moved: dict[tuple[int, str], float] = {}
    for slot in lora.slots:
        change = float((lora.theta[slot.start : slot.stop] - begin[slot.start : slot.stop]).abs().max())
        place = (slot.layer, slot.target)
        moved[place] = max(moved.get(place, 0.0), change)
    for (layer, target), change in moved.items():
        if not change > 0.0:
            raise RoundError(
                f"max|delta|={change} of {target} in layer {layer}: must be > 0; it did not train, report this"
            )
    return max(moved.values())


def _continue(lora: LoraModel, plan: RoundPlan, found: Checkpoint | None) -> FlatAdamW:
    rates = layer_rates(lora.slots, plan.optimiser.layer_rate_decay)
    optimiser = FlatAdamW(lora.theta, plan.optimiser, plan.steps, rates)
    if found:
        lora.theta.copy_(found.theta)
        optimiser.first.copy_(found.first)
        optimiser.second.copy_(found.second)
    return optimiser


def _private_step(
    plan: RoundPlan,
    lora: LoraModel,
    examples: Sequence[Example],
    units: Sequence[Unit],
    streams: Sequence[KeyedStream],
    speed: Speed,
    folder: Path,
    mask: torch.Tensor | None,
) -> PrivateStep:
    """The step, with the prefixes of every record that any step will draw computed already."""
    halves = SplitModel(lora.model, lora.lowest, speed.recompute)
    spill = Spill(folder, speed.prefix_disk_bytes_max) if speed.prefix_disk_bytes_max else None
    cache = PrefixCache(halves, [example.ids for example in examples], speed.prefix_bytes_max, speed.prefixes, spill)
    drawn = {unit for stream in streams for unit in draw(units, stream)}
    cache.fill([index for unit in drawn for index in units[unit].examples], speed.tokens_max)
    mechanism: Mechanism | NoMechanism = NoMechanism(plan.expected_batch)
    if plan.private:
        mechanism = Mechanism(plan.clip_norm, plan.sigma, plan.expected_batch)
    limits = Limits(speed.tokens_max, lora.gradients.rows_max)
    return PrivateStep(lora, halves, cache, examples, units, mechanism, limits, mask)


@contextmanager
def _threads(count: int) -> Iterator[int]:
    """Fix torch's thread count: how a sum is cut among threads decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
