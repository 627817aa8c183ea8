"""Metrics of written answers equal the libraries they come from, at any weights, and say what they cannot do."""

import json
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from evaluation import texts
from evaluation.catalogue import find
from evaluation.errors import NotMeasured
from evaluation.gateset import GateSet
from evaluation.metrics import compare, score
from evaluation.scorer import Subject

EXPECTED = {
    "the parcel is on its way": "the parcel is on its way",
    "your refund was sent on Monday": "your refund was sent on a Monday",
    "we have closed your account": "closed",
    "please reset the password": "",
    "ask the courier": "I'm sorry, but I can't help with that.",
    "sorry, we are closed": "Sorry, we are closed",
    "快递明天送到": "快递明天会送到",
    "请重置密码": "抱歉, 我无法回答这个问题",
}


class Speaking:
    """Says what the table says; more tokens than were asked for are cut, a letter each."""

    def __init__(self, said=EXPECTED):
        self.said, self.asked = said, []

    def generate(self, _adapter, prompts, max_tokens):
        self.asked += prompts
        return [self.said[prompt.removeprefix("p ")][:max_tokens] for prompt in prompts]


@pytest.fixture
def subject(tmp_path):
    rows = [
        {"event_id": str(i), "domain": "en" if text.isascii() else "zh", "prompt": f"p {text}", "completion": text}
        for i, text in enumerate(EXPECTED)
    ]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Subject("candidate", "candidate", Speaking(), GateSet.load(file))


def measured(subject, name, **options):
    return find(name)(subject, {"max_tokens": 200, **options})


def test_words_for_word_empty_and_refused_are_told_record_by_record(subject):
    columns = {
        name: measured(subject, name).rows[:, 0].tolist() for name in ("exact_match", "empty_answers", "refusals")
    }
    assert columns == {
        "exact_match": [1, 0, 0, 0, 0, 0, 0, 0],
        "empty_answers": [0, 0, 0, 1, 0, 0, 0, 0],
        "refusals": [0, 0, 0, 0, 1, 0, 0, 1],
    }
    assert len(subject.scorer.asked) == len(EXPECTED), "three metrics, asked once"


@pytest.mark.parametrize(
    "said",
    [
        "I'm very sorry, but",
        "I cannot do that",
        "As an AI language model",
        "I apologize",
        "  Unfortunately, I",
        "非常抱歉",
        "作为一个人工智能",
    ],
)
def test_openings_of_refusals_are_known(said):
    assert texts._REFUSAL.match(said)


@pytest.mark.parametrize(
    "said", ["double charge", "I can do that", "Sorry state of affairs", "我可以帮你", "as an airline"]
)
def test_other_answers_are_no_refusals(said):
    assert not texts._REFUSAL.match(said)


def test_rouge_l_equals_rouge_score_in_english_and_sees_chinese(subject):
    from rouge_score.rouge_scorer import RougeScorer

    rows = measured(subject, "rouge_l").rows[:, 0]
    plain = RougeScorer(["rougeL"])
    for row, (expected, said) in zip(rows, EXPECTED.items(), strict=True):
        if expected.isascii() and said.isascii():
            assert row == plain.score(expected, said)["rougeL"].fmeasure
    chinese = rows[list(EXPECTED).index("快递明天送到")]
    assert plain.score("快递明天送到", "快递明天会送到")["rougeL"].fmeasure == 0, "what its own tokeniser sees"
    assert chinese == pytest.approx(12 / 13)
    assert "rouge-score-" in measured(subject, "rouge_l").version


def test_bleu_equals_sacrebleu_on_every_resample(subject):
    from sacrebleu.metrics import BLEU

    one = measured(subject, "bleu")
    said, expected, plain = list(EXPECTED.values()), list(EXPECTED), BLEU()
    assert score(one).value == plain.corpus_score(said, [expected]).score
    rng = np.random.default_rng(1)
    for _ in range(20):
        drawn = rng.integers(0, len(said), len(said))
        weights = np.bincount(drawn, minlength=len(said))[None, :].astype(float)
        again = plain.corpus_score([said[i] for i in drawn], [[expected[i] for i in drawn]]).score
        assert one.statistic(weights, one.rows)[0] == pytest.approx(again, rel=1e-12)
    assert "tok:13a" in one.version
    assert "tok:zh" in measured(subject, "bleu", tokenize="zh").version
    assert compare(one, one, "higher").p_worse == 1.0


def test_a_sample_is_spread_over_the_file_and_is_the_same_for_all(subject):
    assert [record.event_id for record in texts.chosen(subject, 4)] == ["0", "2", "4", "6"]
    assert len(texts.chosen(subject, 0)) == len(texts.chosen(subject, 99)) == len(EXPECTED)
    assert measured(subject, "exact_match", samples=2).groups["domain"] == ("en", "en")


@pytest.mark.slow
def test_similarity_by_the_packaged_encoder(subject):
    one = measured(subject, "similarity")
    by = dict(zip(EXPECTED, one.rows[:, 0], strict=True))
    assert by["the parcel is on its way"] == pytest.approx(1.0, abs=1e-5)
    assert by["your refund was sent on Monday"] > 0.9
    assert by["ask the courier"] < 0.3
    assert "53aa51172d14" in one.version, "the hub's all-MiniLM-L6-v2 weights"


@pytest.mark.parametrize("broken", ["package", "weights", "library"])
def test_similarity_without_its_encoder_is_not_measured_and_says_why(subject, monkeypatch, tmp_path, broken):
    texts._encoder.cache_clear()

    class Package:
        def locate_file(self, _name):
            return tmp_path

    def found(_name):
        if broken == "package":
            raise PackageNotFoundError
        return Package()

    if broken == "library":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
        monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    monkeypatch.setattr("importlib.metadata.distribution", found)
    with pytest.raises(NotMeasured, match=r"semantic similarity needs .* pip install 'tidegate\[similarity\]'"):
        measured(subject, "similarity")
    texts._encoder.cache_clear()


def test_an_engine_that_threw_is_not_asked_again(subject):
    class Dead(Speaking):
        def generate(self, _adapter, prompts, _max_tokens):
            self.asked += prompts
            raise RuntimeError("gone")

    dead = Subject("live", "live", Dead(), subject.gate_set)
    for name in ("exact_match", "rouge_l"):
        with pytest.raises(NotMeasured, match="no answers of live: RuntimeError: gone"):
            measured(dead, name)
    assert len(dead.scorer.asked) == len(EXPECTED)
