"""Answers that are being written: their keys and values, and the choice of each next token.

Rows are dense, so that a step runs over exactly the answers there are; an answer may join or leave between any two
steps (continuous batching: Yu et al. 2022, 'Orca').
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from serving.engine import Sampling
from serving.forward import Decoder, Groups, Resident, attention, fold_mask, group_rows

# Keys grow by this many tokens: seldom enough to copy, small enough not to waste.
GROWTH_TOKENS = 64
# An idle engine gives back what a long answer needed.
KEPT_TOKENS = 4 * GROWTH_TOKENS


class Slots:
    """Keys and values of all answers being written, one row each.

    Args:
        decoder: the model.
        rows_max: most answers at once.
        opening: token ids that most prompts begin with, such as those of a system prompt: run once for each adapter.
    """

    def __init__(self, decoder: Decoder, rows_max: int, opening: Sequence[int] = ()) -> None:
        self._decoder = decoder
        self._rows_max = rows_max
        self._opening = list(opening)
        # By adapter, as long as somebody holds it: keys and values of the opening, (depth, K, T, D) each.
        self._opened: WeakKeyDictionary[Resident, tuple[Tensor, Tensor]] = WeakKeyDictionary()
        self._opened_bare: tuple[Tensor, Tensor] | None = None
        self._keys = self._values = torch.empty(0)
        self.clear()

    @property
    def rows(self) -> int:
        """Answers being written."""
        return len(self._lengths)

    def clear(self) -> None:
        """Forget all rows, and the memory."""
        self._lengths: list[int] = []
        self._adapters: list[Resident | None] = []
        self._groups: Groups = []
        self._width = 0

    def opens(self, prompt: Sequence[int]) -> bool:
        """Whether a prompt begins with the opening and goes on."""
        length = len(self._opening)
        return 0 < length < len(prompt) and list(prompt[:length]) == self._opening

    def add(self, prompts: Sequence[Sequence[int]], adapters: Sequence[Resident | None]) -> Tensor:
        """Run new prompts; they become the last rows. Their opening is not run again if all of them have it.

        Returns:
            (n, V) logits behind each prompt.
        """
        first, count, longest = self.rows, len(prompts), max(map(len, prompts))
        opened = [self._open(adapter) for adapter in adapters] if all(map(self.opens, prompts)) else []
        skip = len(self._opening) if opened else 0
        self._reserve(longest)
        for row, (keys, values) in enumerate(opened, start=first):
            self._keys[:, row, :, :skip] = keys
            self._values[:, row, :, :skip] = values
        ids = torch.zeros(count, longest - skip, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt) - skip] = torch.tensor(prompt[skip:])
        # Padding stands behind the prompt: what comes later is never seen, so one mask serves every row.
        mask = fold_mask(torch.ones(1, longest - skip, longest, dtype=torch.bool).tril(skip), self._decoder)
        here = slice(first, first + count)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._keys[layer, here, :, skip:longest] = k
            self._values[layer, here, :, skip:longest] = v
            return attention(q, self._keys[layer, here, :, :longest], self._values[layer, here, :, :longest], mask)

        positions = torch.arange(skip, longest).unsqueeze(0)
        groups = group_rows(adapters)
        hidden = self._decoder.run(self._decoder.embed(ids), positions, groups, attend)
        self._lengths += [len(prompt) for prompt in prompts]
        self._adapters += adapters
        self._groups = group_rows(self._adapters)
        last = torch.tensor([len(prompt) - skip - 1 for prompt in prompts])
        return self._decoder.logits(hidden[torch.arange(count), last], groups)

    def _open(self, adapter: Resident | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the opening under an adapter."""
        known = self._opened_bare if adapter is None else self._opened.get(adapter)
        if known is None:
            alone = Slots(self._decoder, 1)
            alone.add([self._opening], [adapter])
            length = len(self._opening)
            known = alone._keys[:, 0, :, :length].clone(), alone._values[:, 0, :, :length].clone()
            if adapter is None:
                self._opened_bare = known
            else:
                self._opened[adapter] = known
        return known

    def adopt(self, keys: Tensor, values: Tensor, adapter: Resident | None) -> None:
        """Take in an answer that was begun elsewhere, by its keys and values (depth, K, T, D), as the last row."""
        row, length = self.rows, keys.shape[2]
        self._reserve(length)
        self._keys[:, row, :, :length] = keys
        self._values[:, row, :, :length] = values
        self._lengths.append(length)
        self._adapters.append(adapter)
        self._groups = group_rows(self._adapters)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to every row.

        Returns:
            (rows, V) logits behind them.
        """
        rows = self.rows
        self._reserve(max(self._lengths) + 1)
        at = torch.tensor(self._lengths)
        each = torch.arange(rows)
        width = int(at.max()) + 1
        mask = fold_mask((torch.arange(width) <= at.unsqueeze(1)).unsqueeze(1), self._decoder)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._keys[layer][each, :, at] = k[:, :, 0]
            self._values[layer][each, :, at] = v[:, :, 0]
            return attention(q, self._keys[layer, :rows, :, :width], self._values[layer, :rows, :, :width], mask)

        hidden = self._decoder.embed(torch.tensor(tokens).unsqueeze(1))
        hidden = self._decoder.run(hidden, at.unsqueeze(1), self._groups, attend)
        self._lengths = [length + 1 for length in self._lengths]
        return self._decoder.logits(hidden[:, 0], self._groups)

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.rows - 1
        for store in (self._keys, self._values):
            # Whole rows, and the freed one zeroed: a NaN left behind would poison the next answer through its mask.
            if row != last:
                store[:, row] = store[:, last]
            store[:, last] = 0
        self._lengths[row], self._adapters[row] = self._lengths[last], self._adapters[last]
        self._lengths.pop()
        self._adapters.pop()
        self._groups = group_rows(self._adapters)
        if not self._lengths and self._width > KEPT_TOKENS:
            self._keys = self._values = torch.empty(0)
            self._width = 0

    def _reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens. Memory of rows never written is never touched, so costs nothing."""
        if tokens <= self._width:
            return
        decoder, used = self._decoder, max(self._lengths, default=0)
        width = -(-tokens // GROWTH_TOKENS) * GROWTH_TOKENS
        shape = (decoder.depth, self._rows_max, decoder.key_heads, width, decoder.head_size)
        # Zeros and not whatever was there: a masked NaN would still poison its row.
        keys, values = torch.zeros(shape), torch.zeros(shape)
        if self.rows:
            keys[:, : self.rows, :, :used] = self._keys[:, : self.rows, :, :used]
            values[:, : self.rows, :, :used] = self._values[:, : self.rows, :, :used]
        self._keys, self._values, self._width = keys, values, width


# Far below what changes anything, far above where a float32 becomes 0.
_TEMPERATURE_MIN = 1e-20


def choose(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator | None]
) -> list[int | None]:
    """The next token of each row of (B, V) logits; None where they are not finite."""
    best, tokens = logits.max(dim=-1)
    finite = best.isfinite().tolist()
    greedy = tokens.tolist()
    chosen: list[int | None] = []
    for row, (sampling, generator) in enumerate(zip(samplings, generators, strict=True)):
        if not finite[row]:
            chosen.append(None)
        elif sampling.temperature == 0:
            chosen.append(greedy[row])
        else:
            chosen.append(_sample(logits[row], sampling, generator))
    return chosen


def likelihoods(logits: Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Log-probability of a token by (V,) logits, and the `count` likeliest tokens with theirs, likeliest first."""
    logprobs = logits.log_softmax(dim=-1)
    if not count:
        return float(logprobs[token]), []
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> int:
    """One token by temperature and nucleus, from (V,) logits."""
    # The largest logit first: divided by a tiny temperature it would overflow. A temperature that is 0 as a float32
    # would make it NaN.
    p = ((logits - logits.max()) / max(sampling.temperature, _TEMPERATURE_MIN)).softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_p, order = p.sort(descending=True)
        mass_before = sorted_p.cumsum(dim=0) - sorted_p
        sorted_p[1:][mass_before[1:] >= sampling.top_p] = 0  # the first stays, also where top_p is 0 as a float32
        return int(order[torch.multinomial(sorted_p, 1, generator=generator)])
    return int(torch.multinomial(p, 1, generator=generator))
