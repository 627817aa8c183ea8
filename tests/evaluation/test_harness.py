"""The harness on our engine says what the harness by itself says; and what cannot be measured says why."""

import csv
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from evaluation import harness
from evaluation.errors import NotMeasured
from evaluation.gates import evaluate
from evaluation.metrics import paired
from evaluation.policy import GatePolicy, Rule
from evaluation.together import Together
from learner.base import EMBEDDED, prepare_base
from serving.inprocess import InProcessEngine
from tests.evaluation import alone
from tests.evaluation.planted import FACTS, write_gate_set
from tests.serving.adapters import random_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
COLUMNS = {
    "cmmlu": ("Unnamed: 0", "Question", "A", "B", "C", "D", "Answer"),
    "ceval": ("id", "question", "A", "B", "C", "D", "answer", "explanation"),
    "crows_pairs": (
        *("Unnamed: 0", "sent_more", "sent_less", "stereo_antistereo", "bias_type"),
        *("annotations", "anon_writer", "anon_annotators"),
    ),
}
CROWS = ("likelihood_diff", "pct_stereotype")


def data(name):
    if not (DATA / name).exists():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{DATA / name} is not there")
    return DATA / name


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """An engine with two adapters, and where they are."""
    folder = tmp_path_factory.mktemp("harness")
    random_adapter(tiny, folder / "a", 1)
    random_adapter(tiny, folder / "b", 2, layers=(0, 2))
    with InProcessEngine(tiny) as engine:
        engine.load("a", folder / "a")
        engine.load("b", folder / "b")
        yield engine, {"a": folder / "a", "b": folder / "b", None: None}


def cmmlu_alone(folder, cache):
    subjects = sorted(path.stem for path in (folder / "test").glob("*.csv"))
    return [
        alone.csv(
            f"cmmlu_{subject}",
            COLUMNS["cmmlu"],
            {split: str(folder / split / f"{subject}.csv") for split in ("dev", "test")},
            cache,
        )
        for subject in subjects
    ]


def test_cmmlu_says_what_the_harness_says_by_itself(models, tiny, tmp_path):
    engine, folders = models
    asked = harness.ask(engine, ["a", None], "cmmlu", data=data("cmmlu"), items=10)
    samples = alone.samples_of(asked.names)
    specs = [spec for spec in cmmlu_alone(data("cmmlu"), tmp_path) if spec["task"] in samples]
    for name in ("a", None):
        results = alone.run(alone.hflm(tiny, folders[name]), "cmmlu", specs, samples=samples)
        rows = alone.differences(results, asked.reported[name], ("acc", "acc_norm"))
        assert len(rows) >= 2 * len(samples) + 2
        assert [ours for _, _, ours in rows] == [theirs for _, theirs, _ in rows]


def test_five_examples_that_do_not_fit_lose_their_beginning_as_in_the_harness(models, tiny, tmp_path):
    _, folders = models
    with InProcessEngine(tiny, context_max=200) as engine:
        engine.load("a", folders["a"])
        asked = harness.ask(engine, ["a"], "cmmlu", data=data("cmmlu"), shots=5, items=2)
        assert "lost their beginning" in asked.measurement("acc", "a").missing
        samples = alone.samples_of(asked.names)
        specs = [spec for spec in cmmlu_alone(data("cmmlu"), tmp_path) if spec["task"] in samples]
        ours, theirs = (
            alone.run(model, "cmmlu", specs, shots=5, samples=samples)
            for model in (harness.EngineLM(engine, ["a"]), alone.hflm(tiny, folders["a"], max_length=200))
        )
    assert alone.likelihoods(ours) == pytest.approx(alone.likelihoods(theirs), abs=1e-4)
    rows = alone.differences(theirs, asked.reported["a"], ("acc", "acc_norm"))
    assert [mine for _, _, mine in rows] == [other for _, other, _ in rows]


def test_crows_pairs_says_what_the_harness_says_by_itself(models, tiny, tmp_path):
    engine, folders = models
    path = data("crows_pairs") / "crows_pairs_anonymized.csv"
    asked = harness.ask(engine, ["b", "a"], "crows_pairs", data=path, items=8)
    spec = alone.csv("crows_pairs_english", COLUMNS["crows_pairs"], {"test": str(path)}, tmp_path)
    model, samples = alone.hflm(tiny, folders["b"], batch=4), alone.samples_of(asked.names)
    results = alone.run(model, "crows_pairs", [spec], samples=samples, metrics=CROWS)
    for name, theirs, ours in alone.differences(results, asked.reported["b"], CROWS, group=False):
        if "likelihood_diff" in name:
            # A mean of differences of sums in single precision: the harness' own digits, and far more.
            assert f"{ours:.4f}" == f"{theirs:.4f}"
            assert ours == pytest.approx(theirs, rel=1e-6)
        else:
            assert ours == theirs
    domains = asked.measurement("pct_stereotype", "b").groups["domain"]
    assert set(domains) <= {"race-color", "socioeconomic", "gender", "disability", "nationality", "age", "religion"} | {
        "sexual-orientation",
        "physical-appearance",
    }


def test_the_harness_can_be_given_the_engine_as_a_model(models, tiny, tmp_path):
    """Every single likelihood, and whether greedy decoding would say it."""
    engine, folders = models
    specs = cmmlu_alone(data("cmmlu"), tmp_path)[:2]
    samples = {spec["task"]: [0, 7, 11] for spec in specs}
    ours, theirs = (
        alone.run(model, "cmmlu", specs, shots=1, samples=samples)
        for model in (harness.EngineLM(engine, ["b"]), alone.hflm(tiny, folders["b"]))
    )
    assert len(alone.likelihoods(theirs)) == 24
    assert alone.likelihoods(ours) == pytest.approx(alone.likelihoods(theirs), abs=1e-4)
    assert alone.greedy(ours) == alone.greedy(theirs)


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


QUESTIONS = [
    ("What does a ferry carry, among other things?", "cars", "None", "NA", "1.50", "A"),
    ('Which of these is "quoted, with a comma"?', "x, y", "z", "007", "nan", "C"),
    ("How many legs have two cats?", "2", "4", "8", "16", "C"),
]


def test_mmlu_and_ceval_are_read_in_their_native_forms(models, tiny, tmp_path):
    """Their texts are taken as they stand, and judged as the harness by itself judges the same documents."""
    engine, folders = models
    for subject in ("anatomy", "law"):
        numbered = [(str(i), *row, "because") for i, row in enumerate(QUESTIONS)]
        for split in ("dev", "val"):
            write(tmp_path / "ceval" / split / f"{subject}_{split}.csv", [COLUMNS["ceval"], *numbered])
        for split in ("dev", "test"):
            write(tmp_path / "mmlu" / split / f"{subject}_{split}.csv", QUESTIONS)
    mmlu = harness.ask(engine, ["a"], "mmlu", data=tmp_path / "mmlu", shots=1)
    ceval = harness.ask(engine, ["a"], "ceval", data=tmp_path / "ceval", shots=1)
    # "law" is a subject of C-Eval and none of MMLU, anatomy the other way round.
    assert (mmlu.n, ceval.n) == (3, 3)
    model = alone.hflm(tiny, folders["a"])
    docs = [{"question": q, "choices": list(rest[:4]), "answer": "ABCD".index(rest[4])} for q, *rest in QUESTIONS]
    spec = {"task": "mmlu_anatomy", "custom_dataset": lambda **_: dict.fromkeys(("dev", "test"), rows(docs))}
    results = alone.run(model, "mmlu/default", [spec], shots=1, metrics=("acc",))
    assert all(a == b for _, a, b in alone.differences(results, mmlu.reported["a"], ("acc",), group=False))
    files = {split: str(tmp_path / "ceval" / split / f"law_{split}.csv") for split in ("dev", "val")}
    spec = alone.csv("ceval-valid_law", COLUMNS["ceval"], files, tmp_path / "cache")
    results = alone.run(model, "ceval", [spec], shots=1)
    found = alone.differences(results, ceval.reported["a"], ("acc", "acc_norm"), group=False)
    assert len(found) == 4
    assert all(a == b for _, a, b in found)


def rows(docs):
    import datasets

    return datasets.Dataset.from_list(docs)


@pytest.mark.parametrize("suite", sorted(harness.SUITES))
def test_data_that_cannot_be_had_are_not_measured_and_say_why(models, suite, tmp_path):
    engine, _ = models
    asked = harness.ask(engine, ["a"], suite, data=None)
    assert asked.not_measured.startswith(f"{suite}: its data cannot be had from the hub (Couldn't reach")
    assert harness.ask(engine, ["a"], suite, data=tmp_path / "no").not_measured.endswith("see options.data")
    assert "in it; see" in harness.ask(engine, ["a"], suite, data=tmp_path).not_measured
    with pytest.raises(NotMeasured, match="cannot be had"):
        asked.measurement("acc", "a")


def test_malformed_files_are_not_measured_and_say_where(models, tmp_path):
    engine, _ = models
    for split in ("dev", "test"):
        write(tmp_path / "mmlu" / split / f"anatomy_{split}.csv", [*QUESTIONS, ("a question", "two", "choices")])
        write(tmp_path / "cmmlu" / split / "anatomy.csv", [("Question", "A", "B", "C", "D"), QUESTIONS[0][:5]])
    said = harness.ask(engine, ["a"], "mmlu", data=tmp_path / "mmlu").not_measured
    assert "row 4 must be a question, four choices and a letter" in said
    assert "columns Answer are missing" in harness.ask(engine, ["a"], "cmmlu", data=tmp_path / "cmmlu").not_measured


def test_a_part_lies_within_a_larger_part_and_is_said(models):
    engine, _ = models
    few, more = (harness.ask(engine, ["a"], "crows_pairs", data=data("crows_pairs"), items=n) for n in (4, 6))
    assert set(few.names) < set(more.names)
    assert few.measurement("pct_stereotype", "a").missing.startswith("4 of 1508 items were asked")
    assert few.measurement("pct_stereotype", "a").version == more.measurement("pct_stereotype", "a").version
    at = [more.names.index(name) for name in few.names]
    np.testing.assert_allclose(
        few.measurement("likelihood_diff", "a").rows[:, 0],
        more.measurement("likelihood_diff", "a").rows[at, 0],
        atol=1e-3,
    )


def test_an_adapter_that_is_not_finite_is_broken_and_not_right_by_chance(models):
    engine, folders = models
    engine.load("wild", folders["a"])
    for _, b in engine._residents["wild"].parts.values():
        b.fill_(float("nan"))
    asked = harness.ask(engine, ["wild", None], "cmmlu", data=data("cmmlu"), items=6)
    engine.unload("wild")
    assert asked.measurement("acc", "wild").broken == 6
    assert asked.measurement("acc", None).broken == 0


def test_models_are_compared_item_by_item(models):
    engine, _ = models
    asked = harness.ask(engine, ["a", "b"], "cmmlu", data=data("cmmlu"), items=20)
    ours, theirs = (asked.measurement("acc", name).rows[:, 0] == 1 for name in ("a", "b"))
    pair = paired(ours, theirs)
    assert pair.n == 20
    assert pair.gain.value == pytest.approx(ours.mean() - theirs.mean())


@pytest.mark.parametrize("through", ["the engine", "a scorer that keeps answers"])
def test_gates_hold_a_benchmark_against_live_or_the_base_and_say_on_how_many_items(models, tmp_path, through):
    engine, _ = models
    scorer = engine if through == "the engine" else Together(engine, {"a": "a" * 64, None: ""})
    gate_set = write_gate_set(tmp_path / "gates.jsonl", per_domain=2)
    options = {"data": str(data("cmmlu")), "shots": 0, "seconds": 0.001}
    rules = (
        Rule(metric="cmmlu", against="live", bound=0.5, samples_min=10, options=options),
        Rule(metric="mmlu", against="live", samples_min=10, hard=False),
    )

    def judged(candidate, live):
        found = evaluate(gate_set, GatePolicy(rules), scorer, candidate=candidate, live=live, facts=FACTS)
        return found, {gate.name: gate for gate in found.gates}

    found, gates = judged("a", "a")
    assert found.outcome == "passed"
    assert gates["cmmlu_holds_live"].n == 16
    assert "lm-eval 0.4.13 cmmlu/1.0 0-shot data" in gates["cmmlu_holds_live"].version
    assert any("16 of 1233 items were asked" in line for line in found.not_measured)
    assert gates["mmlu_holds_live"].outcome == "undecided"
    assert "its data cannot be had from the hub" in gates["mmlu_holds_live"].sentence
    assert judged("a", None)[1]["cmmlu_holds_base"].outcome == "passed"


@pytest.mark.slow
@pytest.mark.timeout(1800)  # ten minutes where six others want the same two cores
def test_the_135m_base_says_what_the_harness_says_by_itself(tmp_path):
    """24 questions with an example each, and 60 pairs; an adapter on the upper layers, and the bare base.

    Chinese takes this tokenizer about three tokens a character, and the harness looks at the vocabulary behind each of
    them: more questions, or two examples, take a quarter of an hour on a busy machine.
    """
    root = Path(os.environ.get("TIDEGATE_BASES", Path(__file__).resolve().parents[2] / "workspace" / "bases"))
    base = prepare_base(EMBEDDED, root)
    random_adapter(base, tmp_path / "a", 1, layers=tuple(range(24, 30)))
    path = data("crows_pairs") / "crows_pairs_anonymized.csv"
    with InProcessEngine(base, threads=2) as engine:
        engine.load("a", tmp_path / "a")
        cmmlu = harness.ask(engine, ["a", None], "cmmlu", data=data("cmmlu"), shots=1, items=24)
        crows = harness.ask(engine, ["a", None], "crows_pairs", data=path, items=60)
    sys.stdout.write(f"\nboth models on this engine: {cmmlu.seconds:.0f} s CMMLU, {crows.seconds:.0f} s CrowS-Pairs\n")
    samples = alone.samples_of(cmmlu.names)
    # A subject of which no sample is named would be asked whole.
    subjects = [spec for spec in cmmlu_alone(data("cmmlu"), tmp_path) if spec["task"] in samples]
    pairs = alone.csv("crows_pairs_english", COLUMNS["crows_pairs"], {"test": str(path)}, tmp_path)
    for name, folder in (("a", tmp_path / "a"), (None, None)):
        model = alone.hflm(base, folder, batch=2)  # larger ones pad more, and need gigabytes for their logits
        results = alone.run(model, "cmmlu", subjects, shots=1, samples=samples)
        found = alone.differences(results, cmmlu.reported[name], ("acc", "acc_norm"))
        results = alone.run(model, "crows_pairs", [pairs], samples=alone.samples_of(crows.names), metrics=CROWS)
        found += alone.differences(results, crows.reported[name], CROWS, group=False)
        for what, theirs, ours in found:
            sys.stdout.write(f"{name or 'base':6}{what:45}{ours:24.17g}{theirs:24.17g}\n")
        assert len(found) >= 2 * len(samples) + 2 + len(CROWS)
        for what, theirs, ours in found:
            if "likelihood_diff" in what:
                assert f"{ours:.4f}" == f"{theirs:.4f}", what
                assert ours == pytest.approx(theirs, rel=1e-6), what
            else:
                assert ours == theirs, what
