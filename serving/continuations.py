"""How likely given tokens are behind others: any texts of one base, under several adapters at once.

Rows that begin alike share what they begin with: it is run once a call. What lies below the lowest layer any of the
adapters changes is run once for all of them. Rows of which only the last token differs (the choices A, B, C, D of one
question) are one row of the model. Nothing of a row's value depends on which adapters or rows are asked beside it,
but for the rounding of sums in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.forward import Decoder, Groups, Resident, attention, fold_mask
from serving.scoring import LOGIT_ROWS, PASS_TOKENS

TokenRow = tuple[Sequence[int], Sequence[int]]
"""(context, continuation): ids, neither of them empty."""


@dataclass(frozen=True)
class _Target:
    """A token whose likelihood is asked for: of which row of a pass, behind which of its inputs, at which position."""

    row: int
    input: int
    at: int
    token: int


@dataclass(frozen=True)
class Scored:
    """What one pass found under one adapter.

    Attributes:
        adapter: which of the adapters asked.
        rows: which rows of the call.
        likelihoods: (B,) summed log-likelihood of each continuation.
        greedy: (B,) whether each of its tokens is the likeliest at its place.
    """

    adapter: int
    rows: tuple[int, ...]
    likelihoods: NDArray[np.float64]
    greedy: NDArray[np.bool_]


def score(decoder: Decoder, adapters: Sequence[Resident | None], rows: Sequence[TokenRow]) -> Iterator[Scored]:
    """Score rows pass by pass, shortest first.

    Args:
        decoder: the model.
        adapters: None is the bare base.
        rows: at least one; the longest must fit into the context.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(rows):
        by_input.setdefault((*context, *continuation[:-1]), []).append(index)
    inputs = sorted(by_input, key=len)
    # Every row keeps its context's last token: the first thing asked of it is predicted there.
    common = _common(inputs, min(len(context) for context, _ in rows) - 1)
    boundary = min((a.lowest for a in adapters if a), default=decoder.depth)
    groups: list[Groups] = [[] if adapter is None else [(None, adapter)] for adapter in adapters]
    beginnings = _beginnings(decoder, inputs[0][:common], boundary, groups)
    for some in _passes([len(ids) - common for ids in inputs]):
        order = [index for i in some for index in by_input[inputs[i]]]
        behind = [at for at, i in enumerate(some) for _ in by_input[inputs[i]]]
        targets = list(_targets([rows[index] for index in order], behind, common))
        lower, mask = _lower(decoder, [inputs[i][common:] for i in some], beginnings[0], boundary)
        for which, group in enumerate(groups):
            hidden = _run(decoder, lower, group, beginnings[which], mask, start=boundary)
            likelihoods, likeliest = _found(decoder, hidden, targets, group)
            of = np.array([target.row for target in targets])
            summed = np.bincount(of, weights=likelihoods, minlength=len(order)).astype(np.float64)
            greedy = np.bincount(of, weights=likeliest, minlength=len(order)) == np.bincount(of)
            yield Scored(which, tuple(order), summed, greedy)


def _targets(rows: Sequence[TokenRow], behind: Sequence[int], common: int) -> Iterator[_Target]:
    """What is asked of the rows of one pass, each behind one of its inputs, which lack the `common` first tokens."""
    for row, ((context, continuation), at) in enumerate(zip(rows, behind, strict=True)):
        for offset, token in enumerate(continuation):
            yield _Target(row, at, len(context) - 1 + offset - common, token)


_Kept = list[tuple[Tensor, Tensor]]
"""Keys and values, (1, K, C, D) a layer, of the tokens all rows begin with."""


def _beginnings(decoder: Decoder, ids: Sequence[int], boundary: int, groups: Sequence[Groups]) -> list[_Kept]:
    """The common beginning under each adapter; layers below the boundary are the same tensors in all of them."""
    nothing = torch.empty(1, decoder.key_heads, 0, decoder.head_size)
    if not ids:
        return [[(nothing, nothing)] * decoder.depth] * len(groups)
    length = len(ids)
    mask = fold_mask(torch.ones(1, length, length, dtype=torch.bool).tril(), decoder)
    positions = torch.arange(length).unsqueeze(0)

    def keep(kept: _Kept, hidden: Tensor, group: Groups, start: int, stop: int) -> Tensor:
        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((k, v))
            return attention(q, k, v, mask)

        return decoder.run(hidden, positions, group, attend, start=start, stop=stop)

    shared: _Kept = []
    hidden = keep(shared, decoder.embed(torch.tensor([list(ids)])), (), 0, boundary)
    found = []
    for group in groups:
        own = list(shared)
        keep(own, hidden, group, boundary, decoder.depth)
        found.append(own)
    return found


def _lower(decoder: Decoder, rows: Sequence[Sequence[int]], beginning: _Kept, boundary: int) -> tuple[Tensor, Tensor]:
    """What enters layer `boundary`, (B, S, H), and the mask of the pass."""
    width, before = max(map(len, rows)), beginning[0][0].shape[2]
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
    # Padding stands behind: what comes later is never seen, so one mask serves every row.
    sees = torch.ones(1, width, before + width, dtype=torch.bool)
    sees[:, :, before:] = sees[:, :, before:].tril()
    mask = fold_mask(sees, decoder)
    return _run(decoder, decoder.embed(ids), (), beginning, mask, start=0, stop=boundary), mask


def _run(
    decoder: Decoder, hidden: Tensor, group: Groups, beginning: _Kept, mask: Tensor, *, start: int, stop: int = -1
) -> Tensor:
    rows, width, _ = hidden.shape
    before = beginning[0][0].shape[2]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first_k, first_v = (x.expand(rows, -1, -1, -1) for x in beginning[layer])
        return attention(q, torch.cat((first_k, k), dim=2), torch.cat((first_v, v), dim=2), mask)

    positions = torch.arange(before, before + width).unsqueeze(0)
    return decoder.run(hidden, positions, group, attend, start=start, stop=stop)


def _found(
    decoder: Decoder, hidden: Tensor, targets: Sequence[_Target], group: Groups
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-likelihood of each target, and whether it is the likeliest token there; (T,) both."""
    places = {place: i for i, place in enumerate(dict.fromkeys((t.input, t.at) for t in targets))}
    # Where the vocabulary is looked at: the same place once, however many tokens are asked there.
    at = torch.tensor(list(places))
    states = hidden[at[:, 0], at[:, 1]]  # (P, H)
    which = np.array([places[t.input, t.at] for t in targets])
    tokens = np.array([t.token for t in targets])
    likelihoods, likeliest = np.empty(len(targets)), np.empty(len(targets), dtype=bool)
    for first in range(0, len(states), LOGIT_ROWS):
        logits = decoder.logits(states[first : first + LOGIT_ROWS], group)  # (P', V)
        normaliser, best = logits.logsumexp(dim=-1), logits.argmax(dim=-1)
        here = np.flatnonzero((which >= first) & (which < first + LOGIT_ROWS))
        row, token = torch.from_numpy(which[here] - first), torch.from_numpy(tokens[here])
        likelihoods[here] = (logits[row, token].double() - normaliser[row].double()).numpy()
        likeliest[here] = (best[row] == token).numpy()
    return likelihoods, likeliest


def _common(inputs: Sequence[tuple[int, ...]], most: int) -> int:
    """How many ids all inputs begin with, at most `most`."""
    low, high = min(inputs), max(inputs)
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(length, most)


def _passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Inputs in rising length, as many in one pass as PASS_TOKENS holds, at least one."""
    some: list[int] = []
    for index, length in enumerate(lengths):
        if some and (len(some) + 1) * length > PASS_TOKENS:
            yield some
            some = []
        some.append(index)
    yield some
