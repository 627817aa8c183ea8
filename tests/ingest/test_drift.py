"""Drift is found where there is some, and seldom where there is none."""

import json
import random
import stat
import time
from pathlib import Path

import pytest

from ingest import drift
from ingest.drift import DriftWatch
from ingest.record import Record
from tests.ingest.blocks import record
from tests.kafka_servers import missing

CLINC = Path(__file__).resolve().parents[3] / "shared" / "data" / "clinc150" / "train.jsonl"
SIZE = 500


@pytest.fixture(scope="module")
def utterances() -> dict[str, list[Record]]:
    """Real utterances by domain; skips on a laptop without them."""
    if not CLINC.exists():
        missing(str(CLINC))
    by_domain: dict[str, list[Record]] = {}
    for line in CLINC.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_domain.setdefault(row["domain"], []).append(Record.model_validate({"schema_version": 1, **row}))
    return by_domain


@pytest.fixture(scope="module")
def desk(utterances: dict[str, list[Record]]) -> list[Record]:
    return [r for domain in ("banking", "travel", "work") for r in utterances[domain]]


def _block(pool: list[Record], rng: random.Random, size: int = SIZE) -> list[Record]:
    return rng.choices(pool, k=size)


def _settled(path: Path, pool: list[Record], blocks: int = 8, **options: object) -> tuple[DriftWatch, random.Random]:
    rng, watch = random.Random(5), DriftWatch(path, **options)
    for number in range(blocks):
        assert watch.observe(f"b{number}", _block(pool, rng)) == []
    return watch, rng


def _changed(records: list[Record], **changes: object) -> list[Record]:
    return [r.model_copy(update=changes) for r in records]


def test_blocks_alike_raise_at_most_three_alarms_in_a_thousand(tmp_path: Path, utterances: dict) -> None:
    # All 150 labels: most classes are rare, where a plain chi-square would be wrong.
    pool = [r for rows in utterances.values() for r in rows]
    rng, watch = random.Random(1), DriftWatch(tmp_path / "d.json")
    alarms = [s for number in range(1000) for s in watch.observe(f"b{number}", _block(pool, rng))]
    assert len(alarms) <= 3, alarms
    assert (tmp_path / "d.json").stat().st_size < 100_000


def test_records_that_come_in_clusters_seldom_raise_alarms(tmp_path: Path, utterances: dict) -> None:
    pool = [r for rows in utterances.values() for r in rows]
    rng, watch = random.Random(2), DriftWatch(tmp_path / "d.json")
    alarms = []
    for number in range(400):
        # Each person sends five of a kind: five times the variance of independent records.
        records = [r for r in _block(pool, rng, SIZE // 5) for _ in range(5)]
        alarms += watch.observe(f"b{number}", records)
    assert len(alarms) <= 2, alarms


def test_the_tail_of_the_mix_is_what_it_says() -> None:
    """The test that can fail: its probabilities are neither too small (noise alarms) nor useless (nothing does)."""
    rng, shares = random.Random(3), [1 / (rank + 1) for rank in range(60)]
    tails = []
    for _ in range(600):
        now, before = ({} for _ in range(2))
        for counts, size in ((now, 500), (before, 4500)):
            for key in rng.choices(range(60), shares, k=size):
                counts[str(key)] = counts.get(str(key), 0.0) + 1
        tails.append(drift._chi_square_tail(*drift._chi_square(now, before)))
    for level in (0.5, 0.1, 0.02):
        found = sum(tail <= level for tail in tails) / len(tails)
        assert 0.4 * level <= found <= 1.6 * level, (level, found)


def test_a_new_label_is_found_and_named_only_if_declared(tmp_path: Path, desk: list[Record]) -> None:
    for name, labels, says in (("a", {"refund"}, "refund 5 % (usually 0 %)"), ("b", None, "an undeclared label 5 %")):
        watch, rng = _settled(tmp_path / name, desk, labels=labels)
        records = [*_block(desk, rng, SIZE - 25), *_changed(_block(desk, rng, 25), label="refund")]
        (said,) = watch.observe("b8", records)
        assert said.startswith("block b8: mix of labels: "), said
        assert says in said, said


def test_another_mix_of_domains_is_found(tmp_path: Path, utterances: dict, desk: list[Record]) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk)
    said = watch.observe("b8", [*_block(utterances["banking"], rng, 300), *_block(desk, rng, 200)])
    assert any("mix of domains: banking" in sentence for sentence in said), said


@pytest.mark.parametrize(("field", "name"), [("prompt", "prompt length"), ("completion", "completion length")])
def test_doubled_lengths_are_found(tmp_path: Path, desk: list[Record], field: str, name: str) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk)
    records = [r.model_copy(update={field: f"{getattr(r, field)} {getattr(r, field)}"}) for r in _block(desk, rng)]
    (said,) = watch.observe("b8", records)
    assert f"block b8: {name}: typically " in said
    now, usual = (int(part.split()[-1 if i else 0]) for i, part in enumerate(said.split("typically ")[1].split(", ")))
    assert 1.7 <= now / usual <= 2.4


def test_other_words_under_the_same_labels_are_found_and_not_repeated(
    tmp_path: Path, utterances: dict, desk: list[Record]
) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk)
    kitchen = utterances["kitchen_and_dining"]

    def disguised() -> list[Record]:
        return [
            w.model_copy(update={"prompt": k.prompt})
            for w, k in zip(_block(desk, rng), _block(kitchen, rng), strict=True)
        ]

    found = [s for s in watch.observe("b8", disguised()) if "words not seen lately" in s]
    assert len(found) == 1, found
    # One alarm a change: what is new has become what is usual.
    assert not [s for number in range(9, 14) for s in watch.observe(f"b{number}", disguised())]


def test_other_words_in_a_fifth_of_the_prompts_are_enough(tmp_path: Path, utterances: dict, desk: list[Record]) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk, blocks=20)
    foreign = [
        w.model_copy(update={"prompt": k.prompt})
        for w, k in zip(_block(desk, rng, 100), _block(utterances["kitchen_and_dining"], rng, 100), strict=True)
    ]
    (said,) = watch.observe("b20", [*foreign, *_block(desk, rng, 400)])
    assert "words not seen lately" in said


def test_no_word_of_a_record_is_said(tmp_path: Path, desk: list[Record]) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk)
    said = " ".join(watch.observe("b8", _changed(_block(desk, rng), prompt="zanzibar " * 40, completion="quagga")))
    assert "words not seen lately" in said
    assert "zanzibar" not in said
    assert "quagga" not in said


def test_a_restart_goes_on_where_it_was(tmp_path: Path, desk: list[Record]) -> None:
    path, rng = tmp_path / "d.json", random.Random(4)
    one = DriftWatch(tmp_path / "one.json")
    for number in range(10):
        records = _block(desk, rng) if number < 9 else _changed(_block(desk, rng), label="refund")
        # A process of its own for each block.
        said = (one.observe(f"b{number}", records), DriftWatch(path).observe(f"b{number}", records))
        assert said[0] == said[1]
    assert said[0]
    assert DriftWatch(path).observe("b9", records) == []
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda _: b"",
        lambda _: b"[]",
        lambda data: data.replace(b'"version":1', b'"version":2'),
        lambda data: data.replace(b'"ages":"', b'"ages":"####'),
        lambda data: data.replace(b'"label":{', b'"lebal":{', 1),
    ],
)
def test_a_torn_file_is_begun_anew(tmp_path: Path, desk: list[Record], harm) -> None:
    path = tmp_path / "d.json"
    _settled(path, desk)
    path.write_bytes(harm(path.read_bytes()))
    assert DriftWatch(path).observe("b8", _changed(_block(desk, random.Random(6)), label="refund")) == []
    _settled(path, desk)


def test_nothing_and_little_are_no_drift(tmp_path: Path) -> None:
    watch = DriftWatch(tmp_path / "d.json")
    assert watch.observe("b0", []) == []
    assert not (tmp_path / "d.json").exists()
    for number in range(30):
        assert watch.observe(f"b{number}", [record(number, prompt="!", domain=f"d{number}")]) == []


def test_small_blocks_are_put_together(tmp_path: Path, desk: list[Record]) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk)
    said = []
    for number in range(8, 18):
        said += watch.observe(f"b{number}", _changed(_block(desk, rng, 40), label="refund"))
    assert [sentence for sentence in said if sentence.startswith("blocks b8 to b12: mix of labels")]


def test_the_summary_stays_small_whatever_comes(tmp_path: Path) -> None:
    watch, rng = DriftWatch(tmp_path / "d.json"), random.Random(7)
    letters = "abcdefghijklmnopqrstuvwxyz"
    for number in range(30):
        words = ["".join(rng.choices(letters, k=8)) for _ in range(4000)]
        watch.observe(
            f"b{number}", [record(i, label=f"l{number}-{i}", prompt=" ".join(words[i::400])) for i in range(400)]
        )
    assert (tmp_path / "d.json").stat().st_size < 150_000
    assert all(len(mix.counts) <= drift._CLASSES_MAX + 1 for mix in watch._state.mixes.values())
    assert len(DriftWatch(tmp_path / "d.json")._state.mixes["label"].counts) > 0


def test_ten_thousand_records_cost_little(tmp_path: Path, desk: list[Record]) -> None:
    watch, rng = _settled(tmp_path / "d.json", desk)
    best = float("inf")
    for number in range(4):
        records = _block(desk, rng, 10_000)
        begun = time.perf_counter()
        watch.observe(f"large{number}", records)
        best = min(best, time.perf_counter() - begun)
    # About 30 ms on an idle core; a second would be a tenth of what ingest does with so many records.
    assert best < 0.25
