"""Which weights a round trains, what they are called, and where each lies in the flat vector.

Low-rank updates (LoRA: Hu et al. 2021) of the linear layers of a Qwen2 block and of the vocabulary projection, with
peft's names and peft's patterns for ranks and alphas; and bottleneck adapters behind a block's two sublayers (Houlsby
et al. 2019; behind the MLP alone: Pfeiffer et al. 2021). Nothing here needs torch: planning and settings use it too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from learner.errors import AdapterError

if TYPE_CHECKING:
    from learner.plan import LoraSettings

# The linear layers of a Qwen2 block, and the part of the block each lives in.
BLOCK_PART = {
    "q_proj": "self_attn",
    "k_proj": "self_attn",
    "v_proj": "self_attn",
    "o_proj": "self_attn",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "mlp",
}
HEAD = "lm_head"
TARGETS = (*BLOCK_PART, HEAD)
# Where a bottleneck adapter may stand: behind which sublayer, and that sublayer's last linear layer.
PLACES = {"attention": "o_proj", "mlp": "down_proj"}
BOTTLENECK_MATRICES = ("down", "down_bias", "up", "up_bias")
NONLINEARITIES = ("relu", "gelu", "silu")
# No model has more blocks; a pattern that fits none of them fits no model.
LAYERS_MAX = 256
# Why a setting of peft's is not taken; docs/decisions/0009-what-a-step-leaves-out.md says more.
DORA_REFUSED = (
    "use_dora: is refused: DoRA rescales the frozen layer's own output, and all that serves, compares and combines "
    "adapters here relies on an update being added to it; use rslora, a larger r, or a bottleneck"
)

# learner/continual.py divides the ranks of every update into the same groups.
ONE_RANK = (
    "continual=orthogonal: needs one rank everywhere and no bottleneck, so that a round has ranks of its own; "
    "leave out lora.rank_pattern and lora.bottleneck, or take another way"
)

Value = TypeVar("Value", int, float)
Patterns = Sequence[tuple[str, Value]]
"""peft's `rank_pattern` or `alpha_pattern`, in order: the first that fits a module's name decides."""


@dataclass(frozen=True)
class Slot:
    """Where one trained matrix or bias lies in the flat vector.

    Attributes:
        layer: index of its block; the number of blocks for the vocabulary projection, which stands above them all.
        target: a linear layer such as "q_proj", or the sublayer a bottleneck adapter stands behind.
        matrix: "A" (r, in) or "B" (out, r), or one of `bottleneck_shapes`.
    """

    layer: int
    target: str
    matrix: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past its last index in the flat vector."""
        return self.start + math.prod(self.shape)

    @property
    def name(self) -> str:
        """Its name on disk."""
        if self.target in PLACES:
            return bottleneck_name(self.layer, self.target, self.matrix)
        return weight_name(self.layer, self.target, self.matrix)

    @property
    def zero_at_first(self) -> bool:
        """Whether it starts as zero, so that a fresh adapter changes nothing."""
        return self.matrix not in {"A", "down"}


@dataclass(frozen=True)
class BaseShapes:
    """What of a base model's config decides the shapes of an adapter."""

    depth: int
    hidden: int
    linear: Mapping[str, tuple[int, int]]  # (out, in) by target


def base_shapes(config: Mapping[str, Any]) -> BaseShapes:
    """From a Qwen2 config's values.

    Raises:
        LookupError, TypeError: one is missing or no number.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = head * config["num_key_value_heads"]
    wide = config["intermediate_size"]
    linear = {
        "q_proj": (head * heads, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, head * heads),
        "gate_proj": (wide, hidden),
        "up_proj": (wide, hidden),
        "down_proj": (hidden, wide),
        HEAD: (config["vocab_size"], hidden),
    }
    return BaseShapes(config["num_hidden_layers"], hidden, linear)


def module_name(layer: int, target: str) -> str:
    """What peft's patterns are matched with; the vocabulary projection is in no block."""
    return HEAD if target == HEAD else f"model.layers.{layer}.{BLOCK_PART[target]}.{target}"


def weight_name(layer: int, target: str, matrix: str) -> str:
    """The name on disk of matrix "A" or "B" of one adapted linear layer."""
    return f"base_model.model.{module_name(layer, target)}.lora_{matrix}.weight"


def bottleneck_name(layer: int, place: str, matrix: str) -> str:
    """The name on disk of one matrix or bias of a bottleneck adapter."""
    return f"bottleneck.layers.{layer}.{place}.{matrix}"


def bottleneck_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """The two matrices and biases of one bottleneck adapter, by name."""
    return {"down": (width, hidden), "down_bias": (width,), "up": (hidden, width), "up_bias": (hidden,)}


def pattern_error(pattern: str) -> str:
    """What is wrong with a pattern as an expression; empty when nothing is."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f"{pattern!r} is no regular expression ({error})"
    # Such an expression can take for ever on a name it does not fit, and adapters come from elsewhere.
    return f"{pattern!r} repeats a group: name the modules instead" if re.search(r"\)[*+{]", pattern) else ""


def fits(pattern: str, module: str) -> bool:
    """Whether peft would take a pattern for this module: it must fit the end of its name, from a dot on."""
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def chosen(patterns: Patterns[Value], module: str, default: Value) -> Value:
    """The value of the first pattern that fits, or the default."""
    return next((value for pattern, value in patterns if fits(pattern, module)), default)


def scaling(alpha: float, r: int, *, rslora: bool) -> float:
    """What B A x is multiplied by: alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023)."""
    return alpha / (math.sqrt(r) if rslora else r)


def check_settings(
    targets: Sequence[str], rank_pattern: Patterns[int], alpha_pattern: Patterns[float], places: Sequence[str]
) -> None:
    """What can be said of LoRA settings without a model.

    Raises:
        ValueError: an unknown target or place, or a pattern that is no expression or fits no target.
    """
    for key, given, known in (("targets", targets, TARGETS), ("bottleneck_places", places, tuple(PLACES))):
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"lora.{key}={','.join(unknown)}: must be among {','.join(known)}")
    patterns: list[tuple[str, str]] = [("rank_pattern", pattern) for pattern, _ in rank_pattern]
    patterns += [("alpha_pattern", pattern) for pattern, _ in alpha_pattern]
    for key, pattern in patterns:
        if wrong := pattern_error(pattern):
            raise ValueError(f"lora.{key}: {wrong}")
        if not any(fits(pattern, module_name(layer, target)) for target in targets for layer in range(LAYERS_MAX)):
            raise ValueError(
                f"lora.{key}: {pattern!r} fits no target; must be like 'q_proj', 'layers.3.mlp.up_proj' or "
                f"'layers.(4|5).self_attn.[qv]_proj', and lora.targets must hold it"
            )


def layout(settings: LoraSettings, shapes: BaseShapes) -> tuple[Slot, ...]:
    """Every trained weight of these settings on a base: blocks from the bottom, in each first the low-rank updates.

    Raises:
        AdapterError: a layer is outside the base, or a pattern fits nothing that is trained.
    """
    slots: list[Slot] = []
    for layer, target, matrix, shape in _matrices(settings, shapes):
        slots.append(Slot(layer, target, matrix, slots[-1].stop if slots else 0, shape))
    modules = {module_name(slot.layer, slot.target) for slot in slots if slot.matrix == "A"}
    patterns = [pattern for pattern, _ in (*settings.rank_pattern, *settings.alpha_pattern)]
    for pattern in patterns:
        if not any(fits(pattern, module) for module in modules):
            raise AdapterError(f"lora pattern {pattern!r}: fits no adapted layer of this base; see lora.layers")
    return tuple(slots)


def _matrices(settings: LoraSettings, shapes: BaseShapes) -> Iterator[tuple[int, str, str, tuple[int, ...]]]:
    places = [place for place in PLACES if settings.bottleneck and place in settings.bottleneck_places]
    for layer in settings.block_layers(shapes.depth):
        if not 0 <= layer < shapes.depth:
            raise AdapterError(f"lora.layers={layer}: must be in 0..{shapes.depth - 1}, the layers of this base")
        for target in (t for t in BLOCK_PART if t in settings.targets):
            yield from _low_rank(settings, shapes, layer, target)
        for place in places:
            for matrix, shape in bottleneck_shapes(settings.bottleneck, shapes.hidden).items():
                yield layer, place, matrix, shape
    if HEAD in settings.targets:
        yield from _low_rank(settings, shapes, shapes.depth, HEAD)


def _low_rank(
    settings: LoraSettings, shapes: BaseShapes, layer: int, target: str
) -> Iterator[tuple[int, str, str, tuple[int, ...]]]:
    r = settings.rank_of(module_name(layer, target))
    out, inside = shapes.linear[target]
    yield layer, target, "A", (r, inside)
    yield layer, target, "B", (out, r)
