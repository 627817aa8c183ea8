"""How likely each label is as the answer to each prompt, for all labels in one pass a prompt.

What follows a prompt is a tree: labels that begin alike share a branch. Every node of it is one more token of the same
sequence that sees the prompt and its own ancestors only (tree attention: Miao et al. 2023), so a prompt and all its
labels cost one pass, and the vocabulary is only projected where a label token is predicted. The tokens all prompts
begin with (system prompt, template) are run once. Adapters that leave the lower layers alone share them: what enters
the lowest adapted layer is kept between calls for the same prompts and labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.forward import Decoder, Groups, Resident, attention, fold_mask

# Tokens of one pass: matrix products of this height already run at full speed, and answers that
# are being written in the same process wait for at most one pass.
PASS_TOKENS = 512
# Rows of logits at once: 256 x 152k tokens in fp32 is 156 MB.
LOGIT_ROWS = 256
# What may be kept between calls.
KEPT_BYTES_MAX = 1 << 30


@dataclass(frozen=True)
class Tree:
    """All labels' tokens as one tree under the prompt.

    Attributes:
        tokens: (N,) input token of each node; nodes stand behind their parents.
        depth: (N,) distance to the prompt's last token, from 1.
        sees: (N, N) whether a node attends to another (ancestors and itself).
        paths: for each label, (node or -1 for the prompt's last token, token predicted there).
    """

    tokens: Tensor
    depth: Tensor
    sees: Tensor
    paths: tuple[tuple[tuple[int, int], ...], ...]


def grow(labels: Sequence[Sequence[int]]) -> Tree:
    """The tree of some labels' completion ids, end token included."""
    nodes: dict[tuple[int, ...], int] = {}
    paths = []
    for ids in labels:
        path = [(-1, ids[0])]
        for end in range(1, len(ids)):
            node = nodes.setdefault(tuple(ids[:end]), len(nodes))
            path.append((node, ids[end]))
        paths.append(tuple(path))
    sees = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
    for branch, node in nodes.items():
        for end in range(1, len(branch) + 1):
            sees[node, nodes[branch[:end]]] = True
    tokens = torch.tensor([branch[-1] for branch in nodes], dtype=torch.long)
    depth = torch.tensor([len(branch) for branch in nodes], dtype=torch.long)
    return Tree(tokens, depth, sees, tuple(paths))


@dataclass(frozen=True)
class Pass:
    """Some prompts of about the same length, padded on the right, each followed by the tree.

    Attributes:
        rows: which prompts.
        lengths: (B,) tokens of each behind the common beginning.
        ids, positions: (B, S).
        mask: (B, S, C + S) over the common beginning and the row itself.
    """

    rows: tuple[int, ...]
    lengths: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor


class Scorer:
    """Scores labels on one decoder; keeps what enters the lowest adapted layer of the last prompts."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._kept_for: tuple[object, ...] = ()
        self._kept: dict[int, Tensor] = {}

    def scores(
        self,
        adapter: Resident | None,
        boundary: int,
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
    ) -> Iterator[tuple[tuple[int, ...], NDArray[np.float64]]]:
        """Score pass by pass: (which prompts, (B, L) summed log-likelihoods).

        Args:
            adapter: None is the bare base.
            boundary: no adapter that will be asked about the same prompts changes a layer below it.
            prompts: ids of each, not empty.
            labels: completion ids of each, end token included.
        """
        tree = grow(labels)
        common = _common(prompts)
        passes = list(_passes(prompts, len(common), tree))
        question = (boundary, tuple(map(tuple, prompts)), tuple(map(tuple, labels)))
        if question != self._kept_for:
            self._kept_for, self._kept = question, {}
        groups: Groups = [] if adapter is None else [(None, adapter)]
        beginning = self._beginning(common, groups)
        for index, one in enumerate(passes):
            hidden = self._through(index, one, groups, beginning, boundary)
            yield one.rows, self._likelihoods(hidden, one, tree)

    def _beginning(self, common: Sequence[int], groups: Groups) -> list[tuple[Tensor, Tensor]]:
        """Keys and values, (1, K, C, D) a layer, of the tokens all prompts begin with."""
        decoder, length = self._decoder, len(common)
        if not length:
            nothing = torch.empty(1, decoder.key_heads, 0, decoder.head_size)
            return [(nothing, nothing)] * decoder.depth
        kept: list[tuple[Tensor, Tensor]] = []
        mask = fold_mask(torch.ones(1, length, length, dtype=torch.bool).tril(), decoder)

        def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((k, v))
            return attention(q, k, v, mask)

        hidden = decoder.embed(torch.tensor([list(common)]))
        decoder.run(hidden, torch.arange(length).unsqueeze(0), groups, attend)
        return kept

    def _through(
        self, index: int, one: Pass, groups: Groups, beginning: list[tuple[Tensor, Tensor]], boundary: int
    ) -> Tensor:
        """What leaves the last layer, (B, S, H)."""
        rows = len(one.rows)
        mask = fold_mask(one.mask, self._decoder)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            before_k, before_v = (x.expand(rows, -1, -1, -1) for x in beginning[layer])
            return attention(q, torch.cat((before_k, k), dim=2), torch.cat((before_v, v), dim=2), mask)

        hidden = self._kept.get(index)
        if hidden is None:
            hidden = self._decoder.embed(one.ids)
            hidden = self._decoder.run(hidden, one.positions, (), attend, stop=boundary)
            if boundary and sum(x.nbytes for x in self._kept.values()) + hidden.nbytes <= KEPT_BYTES_MAX:
                self._kept[index] = hidden
        return self._decoder.run(hidden, one.positions, groups, attend, start=boundary)

    def _likelihoods(self, hidden: Tensor, one: Pass, tree: Tree) -> NDArray[np.float64]:
        """Summed log-likelihood of each label behind each prompt, (B, L)."""
        rows, nodes = len(one.rows), len(tree.tokens)
        last = hidden[torch.arange(rows), one.lengths - 1].unsqueeze(1)  # (B, 1, H)
        states = torch.cat((last, hidden[:, hidden.shape[1] - nodes :]), dim=1)  # (B, 1 + N, H): node n at n + 1
        wanted = [(node + 1, token) for path in tree.paths for node, token in path]
        at = torch.tensor([node for node, _ in wanted])
        tokens = torch.tensor([token for _, token in wanted])
        flat = states.reshape(rows * (1 + nodes), -1)
        found = np.empty((rows, len(wanted)), dtype=np.float64)
        rows_at_once = max(1, LOGIT_ROWS // (1 + nodes))
        for first in range(0, rows, rows_at_once):
            some = slice(first, min(rows, first + rows_at_once))
            logits = self._decoder.logits(flat[some.start * (1 + nodes) : some.stop * (1 + nodes)])
            normaliser = logits.logsumexp(dim=-1).view(-1, 1 + nodes)
            logits = logits.view(len(normaliser), 1 + nodes, -1)
            found[some] = (logits[:, at, tokens].double() - normaliser[:, at].double()).numpy()
        ends = np.cumsum([len(path) for path in tree.paths])[:-1]
        return np.stack([part.sum(axis=1) for part in np.split(found, ends, axis=1)], axis=1)


def _common(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The ids all prompts begin with; at least one id of each is left over."""
    low, high = min(map(list, prompts)), max(map(list, prompts))
    shortest = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return prompts[0][: min(length, shortest)]


def _passes(prompts: Sequence[Sequence[int]], common: int, tree: Tree) -> Iterator[Pass]:
    """Prompts by length, as many in one pass as PASS_TOKENS holds, at least one."""
    nodes = len(tree.tokens)
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    rows: list[int] = []
    for row in by_length:
        if rows and (len(rows) + 1) * (len(prompts[row]) - common + nodes) > PASS_TOKENS:
            yield _one_pass(prompts, rows, common, tree)
            rows = []
        rows.append(row)
    if rows:
        yield _one_pass(prompts, rows, common, tree)


def _one_pass(prompts: Sequence[Sequence[int]], rows: Sequence[int], common: int, tree: Tree) -> Pass:
    lengths = torch.tensor([len(prompts[row]) - common for row in rows])
    width, nodes = int(lengths.max()), len(tree.tokens)
    ids = torch.zeros(len(rows), width + nodes, dtype=torch.long)
    ids[:, width:] = tree.tokens
    for at, row in enumerate(rows):
        ids[at, : lengths[at]] = torch.tensor(prompts[row][common:])
    positions = torch.arange(common, common + width + nodes).repeat(len(rows), 1)
    positions[:, width:] = common + lengths.unsqueeze(1) - 1 + tree.depth
    mask = torch.zeros(len(rows), width + nodes, common + width + nodes, dtype=torch.bool)
    mask[:, :, :common] = True
    mask[:, :width, common : common + width] = torch.ones(width, width, dtype=torch.bool).tril()
    own = torch.arange(width) < lengths.unsqueeze(1)  # (B, T)
    mask[:, width:, common : common + width] = own.unsqueeze(1)
    mask[:, width:, common + width :] = tree.sees
    return Pass(tuple(rows), lengths, ids, positions, mask)
