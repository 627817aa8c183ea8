"""What several adapters say about the same prompts, in one pass: how likely each label is, and what each would write.

What follows a prompt is a tree: labels that begin alike share a branch, and every node is one more token that sees the
prompt and its own ancestors only (tree attention: Miao et al. 2023, 'SpecInfer'). Four things keep it cheap, and none
changes what is found:

- The tokens all prompts begin with (system prompt, template) are run once a call.
- What lies below the lowest layer that any of the adapters changes is the same for all: run once, branched above.
- A branch is followed only while a label on it can still matter: what was seen of a label bounds its likelihood. The
  likeliest is followed to its end at once, since a run of few tokens costs almost as much as one of many.
- Greedy answers are read off the same pass: while the likeliest token is a branch of the tree, it is a step of the
  answer too. Answers that leave the tree are finished together, whichever adapter and whichever pass they are of.

Tokens of one run lie packed behind each other, whatever prompt they belong to, so that nothing is spent on padding;
only attention sees them as rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.decoding import Slots
from serving.forward import Attend, Decoder, Groups, Resident, attention, fold_mask

# Tokens of prompts in one pass: matrix products of this height run at full speed, and answers that are being written
# in the same process wait for at most one pass.
PASS_TOKENS = 1024
# Rows of logits at once: 256 x 152k tokens in fp32 is 156 MB.
LOGIT_ROWS = 256
# Answers that left the tree and are written together; more would cost memory and gain little.
WRITING_ROWS = 32
Memory = list[tuple[Tensor, Tensor]]
"""Keys and values, (B, K, T, D) a layer."""


@dataclass(frozen=True)
class Tree:
    """All labels' tokens as one tree; node 0 is the prompt's last token.

    Attributes:
        tokens: input token of each node; node 0's is the prompt's own.
        depths: distance to node 0.
        ancestors: of each node, itself last, node 0 left out.
        children: of each node, by token.
        edges: (E, 2) the node and the token predicted there, for all that some label needs.
        paths: (L, D) the edges of each label from node 0 to its end; -1 behind a shorter one.
    """

    tokens: tuple[int, ...]
    depths: tuple[int, ...]
    ancestors: tuple[tuple[int, ...], ...]
    children: tuple[dict[int, int], ...]
    edges: NDArray[np.int64]
    paths: NDArray[np.int64]

    def edges_at(self, node: int) -> NDArray[np.int64]:
        """Indices of the edges that begin at a node."""
        return np.flatnonzero(self.edges[:, 0] == node)


def grow(labels: Sequence[Sequence[int]]) -> Tree:
    """The tree of some labels' completion ids, end token included; without labels it is node 0 alone."""
    tokens: list[int] = [-1]
    ancestors: list[tuple[int, ...]] = [()]
    children: list[dict[int, int]] = [{}]
    edges: dict[tuple[int, int], int] = {}
    paths: list[list[int]] = []
    for ids in labels:
        node, path = 0, []
        for at, token in enumerate(ids):
            path.append(edges.setdefault((node, token), len(edges)))
            if at + 1 == len(ids):
                break
            if token not in children[node]:
                children[node][token] = len(tokens)
                tokens.append(token)
                ancestors.append((*ancestors[node], len(tokens) - 1))
                children.append({})
            node = children[node][token]
        paths.append(path)
    longest = max(map(len, paths), default=0)
    laid = np.array([path + [-1] * (longest - len(path)) for path in paths], dtype=np.int64).reshape(
        len(paths), longest
    )
    depths = tuple(len(above) for above in ancestors)
    known = np.array(list(edges), dtype=np.int64).reshape(-1, 2)
    return Tree(tuple(tokens), depths, tuple(ancestors), tuple(children), known, laid)


@dataclass(frozen=True)
class Scored:
    """How likely an adapter finds each label behind some prompts.

    Attributes:
        adapter: index of the adapter.
        rows: which prompts.
        values: (B, L) summed log-likelihoods; NaN where logits are not finite.
    """

    adapter: int
    rows: tuple[int, ...]
    values: NDArray[np.float64]


@dataclass
class Written:
    """One greedy answer of an adapter.

    Attributes:
        adapter: index of the adapter.
        row: which prompt.
        tokens: what it has so far, without the end token.
        ended: whether that is all.
        broken: its logits are not finite.
        keys, values: of an answer that left the tree, (depth, K, T, D).
    """

    adapter: int
    row: int
    tokens: list[int]
    ended: bool = False
    broken: bool = False
    keys: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)
    values: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)


Found = Sequence[Scored | Written]


class Scorer:
    """Asks adapters on one decoder.

    Args:
        decoder: the model.
        ends: tokens that end an answer.
    """

    def __init__(self, decoder: Decoder, ends: frozenset[int]) -> None:
        self._decoder = decoder
        self._ends = ends

    def ask(
        self,
        adapters: Sequence[Resident | None],
        prompts: Sequence[Sequence[int]],
        labels: Sequence[Sequence[int]],
        *,
        within: float,
        max_tokens: Sequence[int],
    ) -> Iterator[Found]:
        """What each adapter says, some prompts at a time; answers that left the tree come when they are finished.

        Args:
            adapters: None is the bare base.
            prompts: ids of each, not empty.
            labels: completion ids of each, end token included; may be none.
            within: a label that is surely this much less likely than the likeliest, in nats, is given a bound in place
                of its likelihood: that of its beginning. Infinity: every label is followed to its end. Below nought:
                no scores are wanted, and labels only guess at the answers.
            max_tokens: of a greedy answer of each adapter, its end included; 0: none is wanted.
        """
        tree = grow(labels)
        common = len(_common(prompts))
        shared = min((a.lowest for a in adapters if a is not None), default=self._decoder.depth)
        beginning = self._beginning(prompts[0][:common], adapters, shared)
        unfinished = Unfinished(self._decoder, self._ends, adapters, max_tokens)
        for rows in _passes(prompts, common):
            one = Pass(self._decoder, tree, adapters, shared, [prompts[row] for row in rows], common)
            one.read(beginning)
            while (wanted := one.wanted(within, self._ends, max_tokens)).any():
                one.follow(wanted)
            scored = [Scored(i, rows, values) for i, values in enumerate(one.scores())] if within >= 0 else []
            written = one.written(rows, self._ends, max_tokens)
            yield [*scored, *(answer for answer in written if answer.ended or answer.broken)]
            unfinished.add(answer for answer in written if not (answer.ended or answer.broken))
            del one  # its memory, before more is needed
            while unfinished.full:
                yield unfinished.step()
        while unfinished.any:
            yield unfinished.step()

    def _beginning(self, common: Sequence[int], adapters: Sequence[Resident | None], shared: int) -> list[Memory]:
        """For each adapter, keys and values, (1, K, C, D) a layer, of the tokens all prompts begin with."""
        decoder, length = self._decoder, len(common)
        nothing = torch.empty(1, decoder.key_heads, 0, decoder.head_size)
        memories: list[Memory] = [[(nothing, nothing)] * decoder.depth for _ in adapters]
        if not length:
            return memories
        mask = fold_mask(torch.ones(1, length, length, dtype=torch.bool).tril(), decoder)
        positions = torch.arange(length).unsqueeze(0)

        def attend_in(memory: Memory) -> Attend:
            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                memory[layer] = (k, v)
                return attention(q, k, v, mask)

            return attend

        below = decoder.embed(torch.tensor([list(common)]))
        below = decoder.run(below, positions, (), attend_in(memories[0]), stop=shared)
        for adapter, memory in zip(adapters, memories, strict=True):
            memory[:shared] = memories[0][:shared]
            decoder.run(below, positions, _everywhere(adapter), attend_in(memory), start=shared)
        return memories


class Unfinished:
    """Answers that left the tree, written to their ends in one batch, whatever prompts and adapters they are of.

    The batch outlives a pass over prompts: those that are left of it go on with those of the next.

    Args:
        decoder: the model.
        ends: tokens that end an answer.
        adapters: A of them.
        max_tokens: of an answer of each.
    """

    def __init__(
        self,
        decoder: Decoder,
        ends: frozenset[int],
        adapters: Sequence[Resident | None],
        max_tokens: Sequence[int],
    ) -> None:
        self._ends = ends
        self._adapters = adapters
        self._max_tokens = max_tokens
        self._slots = Slots(decoder, WRITING_ROWS)
        self._waiting: deque[Written] = deque()
        self._writing: list[Written] = []

    def add(self, answers: Iterable[Written]) -> None:
        """Take in some more, with their keys and values."""
        self._waiting.extend(answers)

    @property
    def any(self) -> bool:
        """Whether there is anything to write."""
        return bool(self._waiting or self._writing)

    @property
    def full(self) -> bool:
        """Whether a step would have as many rows as it may."""
        return len(self._waiting) + len(self._writing) >= WRITING_ROWS

    def step(self) -> Found:
        """One more token of as many as fit; those that ended with it."""
        while self._waiting and len(self._writing) < WRITING_ROWS:
            answer = self._waiting.popleft()
            self._slots.adopt(answer.keys, answer.values, self._adapters[answer.adapter])
            answer.keys = answer.values = torch.empty(0)
            self._writing.append(answer)
        likeliest, tokens = self._slots.step([answer.tokens[-1] for answer in self._writing]).max(dim=-1)
        finite, chosen = likeliest.isfinite().tolist(), tokens.tolist()
        done = []
        for row in reversed(range(len(self._writing))):
            answer = self._writing[row]
            self._take(answer, chosen[row], finite=finite[row])
            if answer.broken or answer.ended:
                self._slots.remove(row)
                self._writing[row] = self._writing[-1]
                self._writing.pop()
                done.append(answer)
        return done

    def _take(self, answer: Written, token: int, *, finite: bool) -> None:
        answer.broken = not finite
        answer.ended = token in self._ends
        if not (answer.broken or answer.ended):
            answer.tokens.append(token)
            answer.ended = len(answer.tokens) >= self._max_tokens[answer.adapter]


class Pass:
    """Some prompts of about the same length, and as much of the tree behind each as is asked for.

    Args:
        decoder: the model.
        tree: of the labels.
        adapters: A of them.
        shared: no adapter changes a layer below it.
        prompts: B of them.
        common: how many tokens they begin with are in memory already.
    """

    def __init__(
        self,
        decoder: Decoder,
        tree: Tree,
        adapters: Sequence[Resident | None],
        shared: int,
        prompts: Sequence[Sequence[int]],
        common: int,
    ) -> None:
        self._decoder = decoder
        self._tree = tree
        self._adapters = adapters
        self._shared = shared
        self._prompts = prompts
        self._common = common
        self._memories: list[Memory] = []
        nodes, rows, models = len(tree.tokens), len(prompts), len(adapters)
        self._lengths = np.array([len(prompt) for prompt in prompts])
        # Where each node's key stands in its row, the same for every adapter; -1: it was run for none.
        self._columns = np.full((rows, nodes), -1, dtype=np.int64)
        # What enters the lowest adapted layer at each node.
        self._entering: dict[tuple[int, int], Tensor] = {}
        self._run_for = np.zeros((models, rows, nodes), dtype=bool)
        self._edges = np.full((models, rows, len(tree.edges)), np.nan)  # log-likelihood of each edge
        self._likeliest = np.full((models, rows, nodes), -1, dtype=np.int64)  # token behind each node that was run
        self._broken = np.zeros((models, rows), dtype=bool)  # some logits are not finite

    def read(self, beginning: Sequence[Memory]) -> None:
        """Run the prompts behind their common beginning."""
        common, longest = self._common, int(self._lengths.max())
        self._memories = [self._room(memory, longest, model) for model, memory in enumerate(beginning)]
        rows = torch.arange(len(self._prompts)).repeat_interleave(torch.from_numpy(self._lengths - common))
        places = torch.cat([torch.arange(int(length) - common) for length in self._lengths])
        mask = torch.ones(1, longest - common, longest, dtype=torch.bool).tril(common)
        line = _Line(rows, places, places + common, places + common, len(self._prompts), fold_mask(mask, self._decoder))
        entering = self._below(torch.tensor([t for prompt in self._prompts for t in prompt[common:]]), line)
        ends = torch.from_numpy(self._lengths - common).cumsum(dim=0) - 1
        self._columns[:, 0] = self._lengths - 1
        nodes = [(row, 0) for row in range(len(self._prompts))]
        for model in range(len(self._adapters)):
            self._look(model, self._above(model, entering, line)[ends], nodes)

    def wanted(self, within: float, ends: frozenset[int], max_tokens: Sequence[int]) -> NDArray[np.bool_]:
        """(A, B, N) which nodes must be run next: of labels that can still matter, and those answers go through."""
        found = np.zeros_like(self._run_for)
        if within >= 0 and len(self._tree.paths):
            self._open(within, found, to_the_end=True)
            if found.any(axis=0).sum() > PASS_TOKENS:
                found[:] = False
                self._open(within, found, to_the_end=False)
        for model in (model for model, most in enumerate(max_tokens) if most):
            for row in range(len(self._prompts)):
                node, _, ended = self._walk(model, row, ends, max_tokens[model])
                if not (ended or self._broken[model, row]):
                    found[model, row, node] = not self._run_for[model, row, node]
        return found

    def follow(self, wanted: NDArray[np.bool_]) -> None:
        """Run some nodes, each for the adapters that want it; what they descend from was run before."""
        new = [(row, node) for row, node in np.argwhere(wanted.any(axis=0) & (self._columns < 0)).tolist()]
        if new:
            for row, node in new:
                self._columns[row, node] = max(self._lengths.max(), self._columns[row].max() + 1)
            if (short := int(self._columns.max()) + 1 - self._width) > 0:
                self._memories = [self._wider(memory, short) for memory in self._memories]
            entering = self._below(torch.tensor([self._tree.tokens[node] for _, node in new]), self._line(new))
            self._entering |= dict(zip(new, entering, strict=True))
        for model, some in enumerate(wanted):
            nodes = [(row, node) for row, node in np.argwhere(some).tolist()]
            if nodes:
                entering = torch.stack([self._entering[node] for node in nodes])
                self._look(model, self._above(model, entering, self._line(nodes)), nodes)

    def scores(self) -> NDArray[np.float64]:
        """(A, B, L) likelihoods, and bounds of those that were not followed to their ends; NaN where broken."""
        edges = np.concatenate((np.nan_to_num(self._edges), np.zeros((*self._broken.shape, 1))), axis=2)
        found: NDArray[np.float64] = edges[:, :, self._tree.paths].sum(axis=3)  # the edge -1 adds nothing
        found[self._broken] = np.nan
        return found

    def written(self, rows: Sequence[int], ends: frozenset[int], max_tokens: Sequence[int]) -> list[Written]:
        """The answer to every prompt of every adapter that writes, ended or as far as the tree goes."""
        found = []
        for model in (model for model, most in enumerate(max_tokens) if most):
            for at, row in enumerate(rows):
                node, tokens, ended = self._walk(model, at, ends, max_tokens[model])
                answer = Written(model, row, tokens, ended, broken=not ended and bool(self._broken[model, at]))
                if not (ended or answer.broken):
                    answer.tokens.append(int(self._likeliest[model, at, node]))
                    answer.keys, answer.values = self._remembered(model, at, node)
                    answer.ended = len(answer.tokens) >= max_tokens[model]
                found.append(answer)
        return found

    # How

    def _open(self, within: float, found: NDArray[np.bool_], *, to_the_end: bool) -> None:
        """Mark what must be run of each label that may be within so many nats of the likeliest, per adapter and row.

        Args:
            within: in nats.
            found: (A, B, N) where it is marked.
            to_the_end: where no label is whole yet, all that is left of the likeliest; else the next node alone.
        """
        tree, bounds = self._tree, self.scores()
        run = self._run_for[:, :, tree.edges[:, 0]]
        run = np.concatenate((run, np.ones((*run.shape[:2], 1), dtype=bool)), axis=2)  # the edge -1 is no open end
        seen = run[:, :, tree.paths]  # (A, B, L, D)
        whole: NDArray[np.bool_] = np.logical_and.reduce(seen, axis=3)
        best = np.where(whole, bounds, -np.inf).max(axis=2, keepdims=True)
        best = np.where(np.isneginf(best), bounds.max(axis=2, keepdims=True), best)
        open_ends = ((bounds >= best - within) & ~whole)[..., None] & ~seen
        ahead = np.cumsum(~seen, axis=3) == 1
        if to_the_end:
            ahead |= ~np.logical_or.reduce(whole, axis=2)[:, :, None, None]
        open_ends &= ahead
        model, row, label, depth = np.nonzero(open_ends)
        found[model, row, tree.edges[tree.paths[label, depth], 0]] = True

    def _walk(self, model: int, row: int, ends: frozenset[int], max_tokens: int) -> tuple[int, list[int], bool]:
        """How far the greedy answer is known: (the last node, tokens up to it, whether the answer ends there)."""
        node, tokens = 0, list[int]()
        while self._run_for[model, row, node] and not self._broken[model, row]:
            token = int(self._likeliest[model, row, node])
            if token in ends:
                return node, tokens, True
            if token not in self._tree.children[node]:
                break
            node = self._tree.children[node][token]
            tokens.append(token)
            if len(tokens) >= max_tokens:
                return node, tokens, True
        return node, tokens, False

    def _line(self, nodes: Sequence[tuple[int, int]]) -> _Line:
        """How some nodes, sorted, are laid out for attention."""
        rows = np.array([row for row, _ in nodes])
        places = np.arange(len(nodes)) - np.searchsorted(rows, rows)  # among the nodes of the same row
        columns = np.array([self._columns[node] for node in nodes])
        depths = np.array([self._tree.depths[node] for _, node in nodes])
        mask = torch.zeros(len(self._prompts), int(places.max()) + 1, self._width, dtype=torch.bool)
        mask[:, :, 0] = True  # a line without nodes, too, must see something: no softmax of nothing
        for (row, node), place in zip(nodes, places.tolist(), strict=True):
            mask[row, place, : self._lengths[row]] = True
            mask[row, place, self._columns[row, list(self._tree.ancestors[node])]] = True
        return _Line(
            torch.from_numpy(rows),
            torch.from_numpy(places),
            torch.from_numpy(columns),
            torch.from_numpy(self._lengths[rows] - 1 + depths),
            len(self._prompts),
            fold_mask(mask, self._decoder),
        )

    def _below(self, ids: Tensor, line: _Line) -> Tensor:
        """(S,) tokens through the shared layers: (S, H)."""
        attend = line.attend_in(self._memories[0])
        hidden = self._decoder.embed(ids.unsqueeze(0))
        return self._decoder.run(hidden, line.positions.unsqueeze(0), (), attend, stop=self._shared)[0]

    def _above(self, model: int, entering: Tensor, line: _Line) -> Tensor:
        """(S, H) through an adapter's own layers."""
        attend, groups = line.attend_in(self._memories[model]), _everywhere(self._adapters[model])
        hidden, positions = entering.unsqueeze(0), line.positions.unsqueeze(0)
        return self._decoder.run(hidden, positions, groups, attend, start=self._shared)[0]

    @property
    def _width(self) -> int:
        return self._memories[0][0][0].shape[2]

    def _room(self, beginning: Memory, tokens: int, model: int) -> Memory:
        """Room for so many tokens a row, the common beginning in place; the first adapter keeps the shared layers."""
        made = []
        for layer, (keys, values) in enumerate(beginning):
            rows = len(self._prompts) if layer >= self._shared or model == 0 else 0
            # Nought and not whatever was there: a masked NaN would still poison its row.
            room = keys.new_zeros(2, rows, keys.shape[1], tokens, keys.shape[3])
            room[0, :, :, : self._common], room[1, :, :, : self._common] = keys, values
            made.append((room[0], room[1]))
        return made

    def _wider(self, memory: Memory, columns: int) -> Memory:
        pad = torch.nn.functional.pad
        return [(pad(keys, (0, 0, 0, columns)), pad(values, (0, 0, 0, columns))) for keys, values in memory]

    def _look(self, model: int, hidden: Tensor, nodes: Sequence[tuple[int, int]]) -> None:
        """Keep what (n, H) states at some nodes say about the tree."""
        groups = _everywhere(self._adapters[model])
        for first in range(0, len(nodes), LOGIT_ROWS):
            here = slice(first, first + LOGIT_ROWS)
            self._keep(model, self._decoder.logits(hidden[here], groups), nodes[here])

    def _keep(self, model: int, logits: Tensor, nodes: Sequence[tuple[int, int]]) -> None:
        normaliser = logits.logsumexp(dim=-1)
        likeliest = logits.argmax(dim=-1).tolist()
        finite = normaliser.isfinite().tolist()
        edges = [self._tree.edges_at(node) for _, node in nodes]
        rows = torch.arange(len(nodes)).repeat_interleave(torch.tensor([len(some) for some in edges]))
        tokens = torch.from_numpy(self._tree.edges[np.concatenate(edges), 1])
        values = (logits[rows, tokens].double() - normaliser[rows].double()).numpy()
        done = 0
        for (row, node), some, token, good in zip(nodes, edges, likeliest, finite, strict=True):
            self._edges[model, row, some] = values[done : done + len(some)]
            done += len(some)
            self._run_for[model, row, node] = True
            self._likeliest[model, row, node] = token
            self._broken[model, row] |= not good

    def _remembered(self, model: int, row: int, node: int) -> tuple[Tensor, Tensor]:
        """Keys and values, (depth, K, T, D), of a prompt and of what leads to a node of it."""
        path = self._columns[row, list(self._tree.ancestors[node])]
        columns = torch.cat((torch.arange(len(self._prompts[row])), torch.from_numpy(path)))
        memory = self._memories[0][: self._shared] + self._memories[model][self._shared :]
        keys, values = zip(*((k[row][:, columns], v[row][:, columns]) for k, v in memory), strict=True)
        return torch.stack(keys), torch.stack(values)


@dataclass(frozen=True)
class _Line:
    """Where packed tokens stand once every row has its own line.

    Attributes:
        row, place: (S,) the line of each token, and where in it.
        column: (S,) where its key is kept in the row's memory.
        positions: (S,) rotary.
        rows: how many lines.
        mask: from `fold_mask`, over lines and memory.
    """

    row: Tensor
    place: Tensor
    column: Tensor
    positions: Tensor
    rows: int
    mask: Tensor

    def attend_in(self, memory: Memory) -> Attend:
        """Attention that keeps keys and values in a memory; only here do packed tokens become rows."""
        width = int(self.place.max()) + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = memory[layer]
            keys[self.row, :, self.column] = k[0].transpose(0, 1)
            values[self.row, :, self.column] = v[0].transpose(0, 1)
            spread = q.new_zeros(self.rows, width, q.shape[1], q.shape[3])
            spread[self.row, self.place] = q[0].transpose(0, 1)
            out = attention(spread.transpose(1, 2), keys, values, self.mask)
            return out[self.row, self.place].unsqueeze(0)

        return attend


def _everywhere(adapter: Resident | None) -> Groups:
    return [] if adapter is None else [(None, adapter)]


def _common(prompts: Sequence[Sequence[int]]) -> Sequence[int]:
    """The ids all prompts begin with; at least one id of each is left over."""
    low, high = min(map(list, prompts)), max(map(list, prompts))
    shortest = min(map(len, prompts)) - 1
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return prompts[0][: min(length, shortest)]


def _passes(prompts: Sequence[Sequence[int]], common: int) -> Iterator[tuple[int, ...]]:
    """Prompts by length, as many in one pass as PASS_TOKENS holds, at least one."""
    rows: list[int] = []
    tokens = 0
    for row in sorted(range(len(prompts)), key=lambda row: len(prompts[row])):
        own = len(prompts[row]) - common
        if rows and tokens + own > PASS_TOKENS:
            yield tuple(rows)
            rows, tokens = [], 0
        rows.append(row)
        tokens += own
    if rows:
        yield tuple(rows)
