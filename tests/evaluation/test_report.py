"""The verdict is signed and the report says what was found, and what was not."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.continual import memory
from evaluation.gates import GatePolicy, evaluate
from evaluation.report import plot_png, version_markdown
from learner.base import Base
from privacy.errors import SignatureError
from privacy.signing import SigningKey, TrustedKeys
from tests.evaluation.planted import FACTS, Planted, write_gate_set

BASE = Base(Path("/nowhere"), "c" * 64, "SmolLM2-135M-Instruct", "Apache-2.0", {"source": "a wheel"})


@pytest.fixture(scope="module")
def gate_set(tmp_path_factory):
    return write_gate_set(tmp_path_factory.mktemp("gates") / "planted.jsonl")


def judged(gate_set, candidate=0.9, facts=FACTS, live="live", scorer=Planted):
    made = scorer(gate_set, {"candidate": {"": candidate}, "live": {"": 0.7}, None: {"": 0.2}})
    return evaluate(gate_set, GatePolicy(), made, candidate="candidate", live=live, facts=facts)


def report(evaluation, blocks=("b1", "b2"), kept=None):
    return version_markdown(
        evaluation, data_revision="d" * 40, blocks=blocks, parent="version 3", base=BASE, round_id="r0007.1", kept=kept
    )


def test_the_verdict_is_signed_and_holds_the_contract(gate_set, tmp_path):
    signer = SigningKey.load_or_create(tmp_path / "verdicts.pem")
    signed = json.loads(json.dumps(judged(gate_set).verdict(signer, "2026-01-01T00:00:00Z")))
    verdict = TrustedKeys([signer.public]).verify(signed)
    assert (verdict["adapter_sha256"], verdict["parent_sha256"]) == ("a" * 64, "b" * 64)
    assert (verdict["outcome"], verdict["made_at"]) == ("passed", "2026-01-01T00:00:00Z")
    assert verdict["gate_set"] == {"name": "planted", "sha256": gate_set.sha256, "n": 300, "data": "public"}
    contract = {"name", "version", "value", "se", "n", "bound", "hard", "data", "charge_id"}
    assert all(contract <= gate.keys() for gate in verdict["gates"])
    with pytest.raises(SignatureError):
        TrustedKeys([signer.public]).verify(signed | {"outcome": "failed"})


@pytest.mark.parametrize("delta", [float("nan"), float("inf")])
def test_a_broken_candidate_can_be_signed_too(gate_set, tmp_path, delta):
    signer = SigningKey.load_or_create(tmp_path / "verdicts.pem")
    evaluation = judged(gate_set, facts=replace(FACTS, max_abs_delta=delta, share_used=delta))
    signed = evaluation.verdict(signer)
    assert signed["outcome"] == "failed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", signed["made_at"])
    json.dumps(evaluation.metrics(), allow_nan=False)
    assert report(evaluation)
    assert plot_png(evaluation)


def test_metrics_are_flat_finite_numbers(gate_set):
    metrics = judged(gate_set).metrics()
    assert metrics["accuracy"] == pytest.approx(0.9)
    assert {"accuracy.account", "accuracy.billing", "accuracy.delivery"} <= metrics.keys()
    assert metrics["majority_accuracy.account"] == pytest.approx(0.34)
    assert metrics["gate.better_than_base"] == pytest.approx(70)
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_report_says_it_in_order(gate_set):
    text = report(judged(gate_set))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert text.startswith("✓ Passed: a person may approve it\n---\n")
    assert heads == ["Against live", "Gates", "What was spent", "Where it comes from", "Not measured"]
    assert "| epsilon 8, delta 1e-05 | record | 30.0% |" in text
    for part in (
        "SmolLM2-135M-Instruct, licence Apache-2.0",
        "version 3",
        "`b1`, `b2`",
        "d" * 40,
        "](accuracy.png)",
        "](report.html)",
        "of 300 public questions it answers **90% as expected**, the live version 70%, the bare base 20%.",
        "Rejecting the version gives nothing back",
        "round `r0007.1`",
    ):
        assert part in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_every_table_has_straight_columns(gate_set):
    for table in re.findall(r"(?:^\|.*\n)+", report(judged(gate_set)), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_it_is_read_in_a_minute(gate_set):
    kept = memory([dict.fromkeys(("account", "billing", "delivery"), 0.5)] * 2)
    words = re.findall(r"[^\W_]+", report(judged(gate_set), kept=kept))
    assert len(words) < 400, "words and numbers of all tables; what goes beyond is on the page"


def test_a_less_or_equal_does_not_begin_markup(gate_set):
    text = report(judged(gate_set))
    assert "drop ≤ 3 points, or p > 0.05 after Holm" in text
    assert "<" not in text


def test_test_noise_promises_nothing(gate_set):
    text = report(judged(gate_set, facts=replace(FACTS, private=False)))
    assert "guarantees no privacy at all" in text
    assert "epsilon 8" not in text


def test_a_failure_says_why_first(gate_set):
    text = report(judged(gate_set, candidate=0.3))
    assert text.startswith("✗ Failed: it cannot be promoted\n---\n\nIt forgets against live: all records -40.0 points")
    assert text.index("| forgetting | ✗ FAILED |") < text.index("✓ passed")


def test_what_an_engine_says_does_not_become_markup(gate_set):
    class Rude(Planted):
        def score_labels(self, _adapter, _prompts, _labels):
            raise RuntimeError("<img src=x> | [a](b) `c`")

    text = report(judged(gate_set, scorer=Rude), blocks=["b`|<"])
    assert "? Undecided" in text
    assert not re.search(r"(?<!\\)<img", text)
    assert "](b)" not in text.replace("\\](b)", "")
    assert "`b__<`" in text


def test_many_blocks_are_counted_not_listed(gate_set):
    assert "and 8 more" in report(judged(gate_set), blocks=[f"b{i}" for i in range(20)])


@pytest.mark.parametrize("live", ["live", None])
def test_the_plot_is_a_png_and_the_same_each_time(gate_set, live):
    evaluation = judged(gate_set, live=live)
    png = plot_png(evaluation)
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width > 600
    assert height > 300
    assert plot_png(evaluation) == png


def test_what_the_line_has_kept_is_told_by_domain(gate_set):
    kept = memory([{"billing": 0.5, "returns|x": 0.9}, {"billing": 0.75, "returns|x": 0.8}])
    text = report(judged(gate_set), kept=kept)
    assert "Average accuracy over the domains: 77.5%" in text
    assert "+7.5 points" in text
    assert "billing -25.0, returns\\|x +10.0." in text


def test_a_first_version_is_said_to_have_nothing_to_forget(gate_set):
    assert "nothing to forget yet" in report(judged(gate_set), kept=memory([{"billing": 0.5}]))
    assert "line of versions" not in report(judged(gate_set))
