import itertools
import math

import numpy as np
import pytest

from learner.plan import BlockRate
from learner.sampling import BATCH_TOKENS, Unit, draw, gather, split
from tests.learner.rounds import records, stream

BLOCKS = (BlockRate(id="b1", q=0.4), BlockRate(id="b2", q=0.1))


def test_every_unit_is_drawn_independently_at_its_own_rate():
    units = [Unit(0.4, (i,)) for i in range(300)] + [Unit(0.1, (300 + i,)) for i in range(300)]
    hits = np.zeros((400, 600))
    for step in range(400):
        hits[step, draw(units, stream(step))] = 1
    for part, q in ((hits[:, :300], 0.4), (hits[:, 300:], 0.1)):
        error = math.sqrt(q * (1 - q) / part.size)
        assert abs(part.mean() - q) < 5 * error
        assert abs(part.mean() - 1.5 * q) > 5 * error  # the test can fail
        # Poisson: sizes vary as a binomial does; a fixed-size or shuffled sampler would vary less.
        variance = part.sum(1).var()
        assert 0.7 < variance / (300 * q * (1 - q)) < 1.4


def test_the_draw_repeats_for_the_same_step_and_differs_between_steps():
    units = [Unit(0.3, (i,)) for i in range(200)]
    assert draw(units, stream(4)) == draw(units, stream(4))
    assert draw(units, stream(4)) != draw(units, stream(5))


def test_no_units_is_an_empty_draw():
    assert draw([], stream()) == []


def test_units_of_records_are_per_event_and_belong_to_the_first_block_that_holds_them():
    first, second = records(5), records(4, block="b2", seed=1)
    again = first[2]
    gathered, units = gather(BLOCKS, {"b1": [*first, first[0]], "b2": [*second, again]}, "record")
    assert len(units) == 9
    assert [u.q for u in units] == [0.4] * 5 + [0.1] * 4
    assert units[0].examples == (0, 5)  # delivered twice: one unit, clipped once
    assert again not in gathered[6:]


def test_units_of_users_span_blocks():
    blocks = tuple(BlockRate(id=name, q=0.4) for name in ("b1", "b2"))
    first, second = records(10), records(10, block="b2", seed=1)
    gathered, units = gather(blocks, {"b1": first, "b2": second}, "user")
    assert len(gathered) == 20
    assert len(units) == 7
    for unit in units:
        assert len({gathered[i].user_id for i in unit.examples}) == 1
    assert sorted(i for unit in units for i in unit.examples) == list(range(20))


def test_a_split_keeps_every_drawn_unit_once_and_within_its_limits():
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(5, 60, size=200)]
    units = [Unit(0.5, (i,)) for i in range(190)] + [Unit(0.5, tuple(range(190, 200)))]
    drawn = sorted({190, *(int(i) for i in rng.choice(190, size=97, replace=False))})
    batches = split(drawn, units, lengths, tokens_max=256, rows_max=8)
    assert sorted(u for batch in batches for u in batch.units) == drawn
    for batch in batches:
        assert [batch.units[o] for o in batch.owners] == [u for u in batch.units for _ in units[u].examples]
        if len(batch.units) > 1:
            assert len(batch.examples) <= 8
            assert len(batch.examples) * max(lengths[i] for i in batch.examples) <= 256


@pytest.mark.parametrize("seed", range(6))
def test_a_split_wastes_the_fewest_tokens_of_all_cuts_of_the_sorted_draw(seed):
    rng = np.random.default_rng(seed)
    lengths = [int(n) for n in rng.integers(3, 300, size=9)]
    units = [Unit(0.5, (i,)) for i in range(9)]
    ordered = sorted(lengths)

    def tokens(bounds):
        parts = [ordered[a:b] for a, b in itertools.pairwise((0, *bounds, 9))]
        if any(len(part) > 4 or (len(part) > 1 and len(part) * part[-1] > 700) for part in parts):
            return math.inf
        return sum(len(part) * part[-1] + BATCH_TOKENS for part in parts)

    best = min(tokens(bounds) for n in range(9) for bounds in itertools.combinations(range(1, 9), n))
    batches = split(range(9), units, lengths, tokens_max=700, rows_max=4)
    assert sum(len(b.units) * max(lengths[i] for i in b.examples) + BATCH_TOKENS for b in batches) == best
