"""One pass through a Qwen2 model, written out, for rows that use different adapters.

transformers' own forward neither mixes adapters in a batch cheaply nor lets the caller lay out keys and values; both
are what serving is about. Weights and rotary embedding stay those of the loaded `Qwen2ForCausalLM`, and a test holds
the results against it. (Qwen2: Yang et al. 2024. LoRA: Hu et al. 2021. Bottlenecks: Houlsby et al. 2019. Grouped
queries: Ainslie et al. 2023.)

Shapes: B rows, S new tokens a row, T keys, H hidden, Q query heads, K key heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from learner.adapter import Adapter, read_adapter
from learner.base import Base, load_model
from learner.bottleneck import ACTIVATIONS
from learner.errors import LearnerError
from learner.layout import BOTTLENECK_MATRICES, HEAD, bottleneck_name, module_name, weight_name
from serving.errors import EngineError

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (B, Q, S, D), k (B, K, S, D), v) -> (B, S, Q * D); keeps keys and values where it wants them."""


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A bottleneck adapter in memory: z + f(z down + down_bias) up + up_bias.

    Attributes:
        down, up: transposed, (H, w) and (w, H).
    """

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor
    activation: Callable[[Tensor], Tensor]

    def change(self, z: Tensor) -> Tensor:
        """What is added to (..., H)."""
        return self.activation(z @ self.down + self.down_bias) @ self.up + self.up_bias


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter in memory, ready to be added to linear layers.

    Attributes:
        parts: by (layer, target): A transposed (in, r), and B transposed and scaled (r, out).
        head: the same for the vocabulary projection, or None.
        bottlenecks: by (layer, sublayer).
        lowest: the lowest layer it changes; the number of layers when it changes the vocabulary projection alone.
    """

    name: str
    sha256: str
    parts: dict[tuple[int, str], tuple[Tensor, Tensor]]
    head: tuple[Tensor, Tensor] | None
    bottlenecks: dict[tuple[int, str], Bottleneck]
    lowest: int


Groups = Sequence[tuple[Tensor | None, Resident]]
"""Which rows (None: all) carry which adapter. Rows that stand nowhere are the bare base."""


def resident_from(folder: Path, name: str, base: Base, depth: int) -> Resident:
    """Read, check and prepare an adapter for a base of `depth` layers.

    Raises:
        EngineError: it is missing, damaged, not finite, or belongs to another base.
    """
    try:
        adapter = read_adapter(folder, base.sha256, base=base)
    except LearnerError as error:
        raise EngineError(str(error)) from error
    pairs = {place: _pair(adapter, *place) for place in adapter.places()}
    head = next((pair for (_, target), pair in pairs.items() if target == HEAD), None)
    return Resident(
        name=name,
        sha256=adapter.sha256,
        parts={place: pair for place, pair in pairs.items() if place[1] != HEAD},
        head=head,
        bottlenecks={place: _bottleneck(adapter, *place) for place in adapter.bottlenecks()},
        lowest=min(adapter.layers, default=depth),
    )


def _pair(adapter: Adapter, layer: int, target: str) -> tuple[Tensor, Tensor]:
    a, b = (adapter.weights[weight_name(layer, target, matrix)].float() for matrix in "AB")
    scale = adapter.scale_of(module_name(layer, target))
    return a.t().contiguous(), (b * scale).t().contiguous()


def _bottleneck(adapter: Adapter, layer: int, place: str) -> Bottleneck:
    assert adapter.bottleneck  # noqa: S101 - it named this place
    names = (bottleneck_name(layer, place, matrix) for matrix in BOTTLENECK_MATRICES)
    down, down_bias, up, up_bias = (adapter.weights[name].float() for name in names)
    activation = ACTIVATIONS[adapter.bottleneck.nonlinearity]
    return Bottleneck(down.t().contiguous(), down_bias, up.t().contiguous(), up_bias, activation)


def group_rows(adapters: Sequence[Resident | None]) -> Groups:
    """Rows gathered by adapter, for one batch."""
    rows: dict[int, tuple[Resident, list[int]]] = {}
    for row, adapter in enumerate(adapters):
        if adapter is not None:
            rows.setdefault(id(adapter), (adapter, []))[1].append(row)
    if len(rows) == 1:
        ((adapter, members),) = rows.values()
        if len(members) == len(adapters):
            return [(None, adapter)]
    return [(torch.tensor(members), adapter) for adapter, members in rows.values()]


class Decoder:
    """A loaded Qwen2 model's weights, and the pass through them."""

    def __init__(self, base: Base) -> None:
        model = load_model(base)
        config = model.config
        if set(config.layer_types) != {"full_attention"}:
            raise EngineError(
                f"layer_types={sorted(set(config.layer_types))} of {base.name}: must be full_attention; "
                "use_sliding_window must be false in its config.json"
            )
        self.config = config
        self.layers: list[Any] = list(model.model.layers)
        self.depth = len(self.layers)
        self.heads: int = config.num_attention_heads
        self.key_heads: int = config.num_key_value_heads
        self.head_size: int = self.layers[0].self_attn.head_dim
        self.hidden: int = config.hidden_size
        self.context: int = config.max_position_embeddings
        self._model = model

    def embed(self, ids: Tensor) -> Tensor:
        """(B, S) token ids to (B, S, H)."""
        rows: Tensor = self._model.model.embed_tokens(ids)
        return rows

    def logits(self, hidden: Tensor, groups: Groups) -> Tensor:
        """(rows, H) out of the last layer to (rows, V)."""
        normed = self._norm(hidden, self._model.model.norm)
        out: Tensor = self._model.lm_head(normed)
        for rows, adapter in groups:
            if adapter.head is not None:
                _add(out, rows, normed, adapter.head)
        return out

    def run(
        self, hidden: Tensor, positions: Tensor, groups: Groups, attend: Attend, *, start: int = 0, stop: int = -1
    ) -> Tensor:
        """Take (B, S, H) through some layers.

        Args:
            hidden: what enters layer `start`.
            positions: (B, S) or (1, S) rotary positions.
            groups: which rows carry which adapter.
            start: first layer to run.
            stop: layer to stop before; -1 runs the last one too.
            attend: attention, with whatever is remembered of earlier tokens.
        """
        cos, sin = self._model.model.rotary_emb(hidden, positions)
        rotary = (cos.unsqueeze(1), sin.unsqueeze(1))  # (B, 1, S, D)
        for index in range(start, self.depth if stop < 0 else stop):
            hidden = self._layer(index, hidden, rotary, groups, attend)
        return hidden

    def _layer(
        self, index: int, hidden: Tensor, rotary: tuple[Tensor, Tensor], groups: Groups, attend: Attend
    ) -> Tensor:
        layer = self.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        rows, length, _ = hidden.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(rows, length, -1, self.head_size).transpose(1, 2)

        x = self._norm(hidden, layer.input_layernorm)
        q = _rotate(heads(_linear(x, attention.q_proj, groups, (index, "q_proj"))), rotary)
        k = _rotate(heads(_linear(x, attention.k_proj, groups, (index, "k_proj"))), rotary)
        v = heads(_linear(x, attention.v_proj, groups, (index, "v_proj")))
        mixed = _linear(attend(index, q, k, v), attention.o_proj, groups, (index, "o_proj"))
        hidden = hidden + _narrowed(mixed, groups, (index, "attention"))
        x = self._norm(hidden, layer.post_attention_layernorm)
        gate = F.silu(_linear(x, mlp.gate_proj, groups, (index, "gate_proj")))
        up = _linear(x, mlp.up_proj, groups, (index, "up_proj"))
        out = _linear(gate.mul_(up), mlp.down_proj, groups, (index, "down_proj"))
        return hidden + _narrowed(out, groups, (index, "mlp"))

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        return F.rms_norm(x, (self.hidden,), norm.weight, norm.variance_epsilon)


def fold_mask(mask: Tensor, decoder: Decoder) -> Tensor:
    """A mask (B, S, T), true where attended, for `attention`: (B, 1, group * S, T), additive."""
    folded = mask.repeat(1, decoder.heads // decoder.key_heads, 1).unsqueeze(1)
    return torch.zeros(folded.shape).masked_fill_(~folded, float("-inf"))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention without repeating keys: query heads of a group become more queries of their key head.

    Args:
        q: (B, Q, S, D).
        k: (B, K, T, D).
        v: (B, K, T, D).
        mask: from `fold_mask`.

    Returns:
        (B, S, Q * D).
    """
    rows, heads, length, size = q.shape
    key_heads = k.shape[1]
    folded = q.reshape(rows, key_heads, heads // key_heads * length, size)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    return out.reshape(rows, heads, length, size).transpose(1, 2).reshape(rows, length, heads * size)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves convention."""
    cos, sin = rotary
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def _linear(x: Tensor, module: Any, groups: Groups, place: tuple[int, str]) -> Tensor:
    """A linear layer plus the adapters of its rows."""
    out = F.linear(x, module.weight, module.bias)
    for rows, adapter in groups:
        part = adapter.parts.get(place)
        if part is not None:
            _add(out, rows, x, part)
    return out


def _add(out: Tensor, rows: Tensor | None, x: Tensor, part: tuple[Tensor, Tensor]) -> None:
    """Add a low-rank update of some rows of x to the same rows of out."""
    a, b = part
    if rows is None:
        out += (x @ a) @ b
    else:
        out.index_add_(0, rows, (x.index_select(0, rows) @ a) @ b)


def _narrowed(out: Tensor, groups: Groups, place: tuple[int, str]) -> Tensor:
    """A sublayer's output with the bottleneck adapters of its rows."""
    for rows, adapter in groups:
        bottleneck = adapter.bottlenecks.get(place)
        if bottleneck is None:
            continue
        if rows is None:
            out += bottleneck.change(out)
        else:
            out.index_add_(0, rows, bottleneck.change(out.index_select(0, rows)))
    return out
