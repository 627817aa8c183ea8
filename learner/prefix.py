"""The two halves of a base model: what lies below the lowest adapted layer, and the rest.

Autograd stops at the lowest adapted layer, so the activations entering it are constants of a record: computed once a
round and kept, they spare every later step the lower layers. The cache holds them as computed, so it changes nothing.

Sequences are padded on the right. Under causal attention a real token then never sees a padded one, and what padded
positions produce is neither read nor differentiated: no padding mask is needed.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from learner.errors import RoundError

Recompute = Literal["none", "reentrant", "non-reentrant"]
"""What backward does about a layer's activations: keep them, or run the layer again (Chen et al. 2016)."""


@dataclass(frozen=True)
class Spill:
    """Where prefixes go that memory has no room for: a folder as private as the records, and how much it may take."""

    folder: Path
    bytes_max: int


class SplitModel:
    """Runs a `Qwen2ForCausalLM` in two parts, split below layer `lowest`.

    Args:
        model: the model, with what is trained injected.
        lowest: the first layer of the upper part.
        recompute: both kinds of running a layer again give the very same gradients, for less memory and more time.

    Raises:
        RoundError: the model's attention is not plain causal sdpa (its mask would be left out silently).
    """

    def __init__(self, model: Any, lowest: int, recompute: Recompute = "none") -> None:
        attention = model.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
        kinds = set(model.config.layer_types)
        if attention != "sdpa" or kinds != {"full_attention"}:
            raise RoundError(
                f"attention={attention}/{','.join(sorted(kinds))}: must be sdpa/full_attention; "
                "load the base with learner.base.load_model"
            )
        self._decoder = model.model
        self._head = model.lm_head.weight  # (V, H)
        self._lowest = lowest
        self._recompute = recompute
        # The reentrant kind looks at its arguments alone: where none asks for a gradient, it trains nothing below.
        self._anchor = torch.zeros(0, requires_grad=True)

    def lower(self, ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, H), the input of the lowest adapted layer."""
        with torch.no_grad():
            hidden: Tensor = self._decoder.embed_tokens(ids)
            return self._run(hidden, self._decoder.layers[: self._lowest])

    def upper(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """(B, T, H) from `lower` to the final norm's input (B, C, H) at these positions (B, C).

        Only what predicts a completion token is looked at, so the last layer is run for those positions alone: its
        keys and values come from every position, its queries and its MLP from the C wanted ones.
        """
        layers = self._decoder.layers
        below = self._run(hidden, layers[self._lowest : -1])
        return self._again(partial(self._run_last, layer=layers[-1], positions=positions), below)

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm, on any (..., H)."""
        out: Tensor = self._decoder.norm(hidden)
        return out

    @property
    def head(self) -> Tensor:
        """(V, H)."""
        head: Tensor = self._head
        return head

    def _run(self, hidden: Tensor, layers: Any) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]  # (1, T)
        rotary = self._decoder.rotary_emb(hidden, positions)
        for layer in layers:
            # sdpa without a mask is causal (transformers: is_causal)
            run = partial(layer, attention_mask=None, position_embeddings=rotary, position_ids=positions)
            hidden = self._again(run, hidden)
        return hidden

    def _again(self, run: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """run(hidden); backward runs it again instead of keeping what is in between, where that is wanted."""
        if self._recompute == "none" or not torch.is_grad_enabled():
            return run(hidden)
        # Dropout masks come from their own seeds: there is no state of a generator to restore.
        out: Tensor = checkpoint(
            lambda x, _anchor: run(x),
            hidden,
            self._anchor,
            use_reentrant=self._recompute == "reentrant",
            preserve_rng_state=False,
        )
        return out

    def _run_last(self, hidden: Tensor, layer: Any, positions: Tensor) -> Tensor:
        """Qwen2's decoder layer with queries at `positions` (B, C) only; (B, C, H)."""
        from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

        attention = layer.self_attn
        every = torch.arange(hidden.shape[1])[None]  # (1, T)
        normed = layer.input_layernorm(hidden)
        query = _heads(attention.q_proj(_at(normed, positions)), attention.head_dim)  # (B, heads, C, d)
        key = _heads(attention.k_proj(normed), attention.head_dim)  # (B, kv heads, T, d)
        value = _heads(attention.v_proj(normed), attention.head_dim)
        query, _ = apply_rotary_pos_emb(query, query, *self._decoder.rotary_emb(hidden, positions))
        _, key = apply_rotary_pos_emb(key, key, *self._decoder.rotary_emb(hidden, every))
        groups = attention.num_key_value_groups
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(groups, dim=1),
            value.repeat_interleave(groups, dim=1),
            attn_mask=(every[:, None] <= positions[:, :, None])[:, None],  # (B, 1, C, T): causal
            scale=attention.scaling,
        )
        residual = _at(hidden, positions) + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return out


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """(B, T, heads * d) to (B, heads, T, d)."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    """(B, T, H) at (B, C) to (B, C, H)."""
    return hidden.gather(1, positions[:, :, None].expand(-1, -1, hidden.shape[2]))


class PrefixCache:
    """Inputs of the lowest adapted layer, one (T, H) tensor per record, up to a bound; beyond it they are recomputed.

    Args:
        model: the split model.
        examples: token ids per record.
        bytes_max: memory the cache may take.
        spill: takes what is beyond, in a file that has no name, so that it is gone with the process, however that ends.
        shared: prefixes by token ids, kept over several rounds of one base, one lowest layer and one precision by the
            caller, who also bounds them. As private as the records.
    """

    def __init__(
        self,
        model: SplitModel,
        examples: Sequence[Sequence[int]],
        bytes_max: int,
        shared: MutableMapping[tuple[int, ...], Tensor] | None = None,
        spill: Spill | None = None,
    ) -> None:
        self._shared = shared
        self._spill = spill
        self._spilt: Tensor | None = None  # the free rest of the file, a flat view
        self._model = model
        self._examples = examples
        self._bytes_left = bytes_max
        self._kept: dict[int, Tensor] = {}

    def fill(self, wanted: Sequence[int], tokens_max: int) -> None:
        """Compute the records `wanted`, shortest first, to the bound. The order is fixed: a resumed round repeats it.

        With nothing below the lowest adapted layer there is nothing to keep but embeddings, which are looked up faster.
        """
        if self._model._lowest == 0:  # noqa: SLF001 - the other half of this file
            return
        order = sorted(wanted, key=lambda i: (len(self._examples[i]), i))
        batch: list[int] = []
        for index in order:
            if self._shared is not None and tuple(self._examples[index]) in self._shared:
                continue
            if batch and len(self._examples[index]) * (len(batch) + 1) > tokens_max:
                self._keep(batch)
                batch = []
            batch.append(index)
        if batch:
            self._keep(batch)

    def _keep(self, batch: Sequence[int]) -> None:
        if self._bytes_left <= 0 and self._spill is None:
            return
        hidden = self._model.lower(padded([self._examples[i] for i in batch]))
        for row, index in enumerate(batch):
            prefix = hidden[row, : len(self._examples[index])]
            if self._shared is not None:
                self._shared[tuple(self._examples[index])] = prefix.clone()
                continue
            self._bytes_left -= prefix.nbytes
            if self._bytes_left >= 0:
                self._kept[index] = prefix.clone()
            elif self._spill is None or not self._write(index, prefix):
                self._spill = None
                return

    def _write(self, index: int, prefix: Tensor) -> bool:
        """Whether the file had room for it. As memory is short from here on, what follows goes to the file too."""
        self._bytes_left = -1
        if self._spilt is None and self._spill:
            self._spilt = _nameless_file(self._spill, prefix.dtype)
        if self._spilt is None or len(self._spilt) < prefix.numel():
            return False
        self._kept[index] = self._spilt[: prefix.numel()].view(prefix.shape).copy_(prefix)
        self._spilt = self._spilt[prefix.numel() :]
        return True

    def hidden(self, indices: Sequence[int]) -> Tensor:
        """(B, T, H) for these records, padded on the right."""
        kept = [prefix for i in indices if (prefix := self._find(i)) is not None]
        if len(kept) < len(indices):
            return self._model.lower(padded([self._examples[i] for i in indices]))
        return torch.nn.utils.rnn.pad_sequence(kept, batch_first=True)

    def _find(self, index: int) -> Tensor | None:
        if self._shared is None:
            return self._kept.get(index)
        return self._shared.get(tuple(self._examples[index]))


def _nameless_file(spill: Spill, dtype: torch.dtype) -> Tensor | None:
    """A flat tensor over a new file of mode 0600 that is in no folder; None when the disk has no room for it.

    The room is taken at once: a full disk would otherwise end the process where it writes to the mapped memory.
    """
    size = spill.bytes_max // mmap.PAGESIZE * mmap.PAGESIZE
    if not size:
        return None
    with tempfile.TemporaryFile(dir=spill.folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            return None
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype)


def padded(examples: Sequence[Sequence[int]]) -> Tensor:
    """(B, T) ids, right-padded with id 0, which is never looked at."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(e) for e in examples], batch_first=True)
