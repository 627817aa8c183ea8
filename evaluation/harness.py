"""EleutherAI's lm-evaluation-harness on this repository's engine: its tasks, prompts and metrics, our forward pass.

The only file that imports `lm_eval`. Prompts are built and answers judged by the harness' own task objects, from its
own definitions; an `LM` of the harness hands their requests to the engine, for several adapters in one pass. So a score
is what the harness says of the same model when it is run by itself (tests/evaluation/test_harness.py).

Data come by the dataset's name from the hub, or from local files in the form their authors publish them:

    mmlu         FOLDER/dev/SUBJECT_dev.csv, FOLDER/test/SUBJECT_test.csv       (Hendrycks et al. 2021)
    ceval        FOLDER/dev/SUBJECT_dev.csv, FOLDER/val/SUBJECT_val.csv         (Huang et al. 2023)
    cmmlu        FOLDER/dev/SUBJECT.csv, FOLDER/test/SUBJECT.csv                (Li et al. 2024)
    crows_pairs  FILE, or FOLDER/crows_pairs_anonymized.csv                     (Nangia et al. 2020)
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
from lm_eval.api.metrics import aggregate_subtask_metrics, mean, mean_stderr, pooled_sample_stderr
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from numpy.typing import NDArray

from evaluation.errors import NotMeasured
from evaluation.measurement import Measurement, Rows
from evaluation.scorer import ScoresTokens
from evaluation.suite import Asked, Names, left_out, nested, within

HARNESS = f"lm-eval {lm_eval.__version__}"
_DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"
_CHOICES = "ABCD"
Doc = Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """A benchmark of the harness.

    Attributes:
        group: its name there.
        folder: of its definitions, below the harness' tasks.
        prefix: a subject's task is called `prefix + subject`; the whole benchmark is one task where it is empty.
        files: by the harness' split, where a subject's file is below the data folder.
        read: one file to documents as the dataset on the hub has them.
        part: what a document is sliced by, where it is not by subject.
    """

    group: str
    folder: str
    prefix: str
    files: Mapping[str, str]
    read: Callable[[Path], list[Doc]]
    part: str = ""


def _with_header(columns: Sequence[str], path: Path) -> list[Doc]:
    """Rows as they stand: text stays text, so that "None", "NA" and "1.50" are answers like any other."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    lacking = [name for name in columns if not rows or rows[0].get(name) is None]
    if lacking:
        raise NotMeasured(f"{path}: columns {', '.join(lacking)} are missing, or it has no rows")
    return [{name: row[name] for name in columns} for row in rows]


def _mmlu(path: Path) -> list[Doc]:
    """No header: question, four choices, the letter of the right one."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    wrong = [number for number, row in enumerate(rows, 1) if len(row) != 6 or row[5] not in _CHOICES]  # noqa: PLR2004
    if wrong or not rows:
        raise NotMeasured(f"{path}: row {wrong[0] if wrong else 1} must be a question, four choices and a letter")
    return [{"question": row[0], "choices": row[1:5], "answer": _CHOICES.index(row[5])} for row in rows]


SUITES: Mapping[str, Suite] = {
    "mmlu": Suite("mmlu", "mmlu/default", "mmlu_", {"dev": "dev/{}_dev.csv", "test": "test/{}_test.csv"}, _mmlu),
    "ceval": Suite(
        "ceval-valid",
        "ceval",
        "ceval-valid_",
        {"dev": "dev/{}_dev.csv", "val": "val/{}_val.csv"},
        partial(_with_header, ("question", "A", "B", "C", "D", "answer")),
    ),
    "cmmlu": Suite(
        "cmmlu",
        "cmmlu",
        "cmmlu_",
        {"dev": "dev/{}.csv", "test": "test/{}.csv"},
        partial(_with_header, ("Question", "A", "B", "C", "D", "Answer")),
    ),
    "crows_pairs": Suite(
        "crows_pairs_english",
        "crows_pairs",
        "",
        {"test": "crows_pairs_anonymized.csv"},
        partial(_with_header, ("sent_more", "sent_less", "stereo_antistereo", "bias_type")),
        part="bias_type",
    ),
}


def ask(
    scorer: ScoresTokens,
    adapters: Names,
    suite: str,
    *,
    data: Path | None,
    shots: int = 0,
    seconds: float = 60.0,
    seed: int = 0,
    items: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Asked:
    """Ask several models of one base a benchmark; never raises for data that are missing or malformed.

    Args:
        scorer: the engine that holds them.
        adapters: their names; None is the bare base.
        suite: a key of `SUITES`.
        data: local files; None: the dataset on the hub, by the name the harness knows.
        shots: solved examples before each question, the first of the dataset's own development split.
        seconds: budget of asking; see `evaluation.suite.within`.
        seed: of which items are asked when not all are.
        items: exactly so many, whatever the budget.
        clock: seconds.
    """
    begin = clock()
    try:
        with _quiet():
            tasks = _from_files(SUITES[suite], data) if data is not None else _from_hub(SUITES[suite])
            for task in tasks.values():
                task.set_config("num_fewshot", shots)
                task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            run = _Run(scorer, adapters, tasks)
            every = [(name, index) for name, task in tasks.items() for index in range(len(task.eval_docs))]
            order = nested(every, seed, lambda item: f"{item[0]} {item[1]}")
            order = order if items is None else order[:items]
            within(order, seconds if items is None else float("inf"), run.ask, clock)
    except NotMeasured as error:
        return Asked(seconds=clock() - begin, not_measured=f"{suite}: {error}")
    version = f"{HARNESS} {suite}/{_versions(tasks)} {shots}-shot data {_digest(tasks)[:12]}"
    return run.asked(SUITES[suite], version, len(every), seconds, clock() - begin)


class EngineLM(TemplateLM):  # type: ignore[misc]  # the harness ships no types
    """The harness' view of the engine. Scores every request under all adapters, and answers for the first.

    Tokenises as the harness' own `HFLM` does with a causal model and its defaults. Answers that must be written are
    not asked for by any suite here.

    Attributes:
        found: after `loglikelihood`: (A, N) log-likelihoods and (A, N) greedy flags of its requests.
        cut: requests so far whose context was too long and lost its beginning.
    """

    def __init__(self, scorer: ScoresTokens, adapters: Names) -> None:
        super().__init__()
        self._scorer = scorer
        self._adapters = adapters
        self.tokenizer = scorer.tokenizer
        self.found: tuple[NDArray[np.float64], NDArray[np.bool_]] | None = None
        self.cut = 0

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        """Most tokens the model looks at."""
        return self._scorer.context_max

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer.encode(string, **special)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            whole = [*context, *continuation]
            self.cut += len(whole) > self.max_length + 1
            whole = whole[-(self.max_length + 1) :]
            rows.append((whole[: -len(continuation)], whole[-len(continuation) :]))
        self.found = self._scorer.score_tokens(self._adapters, rows)
        return list(zip(self.found[0][0].tolist(), self.found[1][0].tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Any, **_kwargs: Any) -> list[float]:
        """Not asked for by any suite here."""
        raise NotMeasured(f"{len(requests)} requests ask for the likelihood of whole texts; no suite here does")

    def generate_until(self, requests: Any, **_kwargs: Any) -> list[str]:
        """Not asked for by any suite here."""
        raise NotMeasured(f"{len(requests)} requests ask for written answers; no suite here does")


class _Run:
    """Tasks and what became of their documents."""

    def __init__(self, scorer: ScoresTokens, adapters: Names, tasks: Mapping[str, Any]) -> None:
        self._lm = EngineLM(scorer, adapters)
        self._adapters = tuple(adapters)
        self._tasks = tasks
        self._metrics: dict[tuple[str, int], list[dict[str, float]]] = {}

    def ask(self, items: Sequence[tuple[str, int]]) -> None:
        """Ask some documents; those of one task together, because they begin alike."""
        by_task: dict[str, list[int]] = {}
        for name, index in items:
            by_task.setdefault(name, []).append(index)
        for name, indices in by_task.items():
            self._ask(name, self._tasks[name], sorted(indices))

    def _ask(self, name: str, task: Any, indices: list[int]) -> None:
        task.build_all_requests(samples=indices, rank=0, world_size=1)
        self._lm.loglikelihood(task.instances, disable_tqdm=True)
        likelihoods, greedy = self._lm.found or (np.empty((0, 0)), np.empty((0, 0), dtype=bool))
        docs = list(task.doc_iterator(rank=0, world_size=1, samples=indices))
        for which in range(len(self._adapters)):
            for at, instance in enumerate(task.instances):
                instance.resps = [(float(likelihoods[which, at]), bool(greedy[which, at]))]
            task.apply_filters()
            by_doc: dict[int, list[Any]] = {}
            for instance in sorted(task.instances, key=lambda one: one.idx):
                by_doc.setdefault(instance.doc_id, []).append(instance.filtered_resps["none"])
            for doc_id, doc in docs:
                found = {key: float(value) for key, value in task.process_results(doc, by_doc[doc_id]).items()}
                if not all(np.isfinite(likelihood) for likelihood, _ in by_doc[doc_id]):
                    found = dict.fromkeys(found, float("nan"))  # else the first choice would count as given
                self._metrics.setdefault((name, indices[doc_id]), []).append(found)

    def asked(self, suite: Suite, version: str, of: int, seconds: float, took: float) -> Asked:
        """All of it as measurements, items in the suite's own order."""
        # The order in which the harness adds up a group's tasks: another one could change the last digit.
        names = list(self._tasks)
        items = sorted(self._metrics, key=lambda item: (names.index(item[0]), item[1]))
        parts = [self._part(suite, name, index) for name, index in items]
        task_of = np.array([names.index(name) for name, _ in items], dtype=np.float64)
        missing = left_out(len(items), of, seconds)
        if self._lm.cut:
            missing += f"{'; ' if missing else ''}{self._lm.cut} contexts were too long and lost their beginning"
        found: dict[str, dict[str | None, Measurement]] = {}
        for metric in self._metrics[items[0]][0]:
            for which, adapter in enumerate(self._adapters):
                values = np.array([self._metrics[item][which][metric] for item in items])
                found.setdefault(metric, {})[adapter] = Measurement(
                    np.column_stack((values, task_of)),
                    groups={"domain": tuple(parts)},
                    point=_whole,
                    version=f"{version} {metric}",
                    missing=missing,
                )
        reported = {adapter: _reported(names, found, adapter) for adapter in self._adapters}
        asked = tuple(f"{name} {index}" for name, index in items)
        return Asked(found, asked, of, took, reported=reported)

    def _part(self, suite: Suite, name: str, index: int) -> str:
        return str(self._tasks[name].eval_docs[index][suite.part]) if suite.part else name.removeprefix(suite.prefix)


def _whole(rows: Rows) -> float:
    """The harness' figure of a benchmark: its subjects' means, weighted by their sizes. Rows of (value, subject)."""
    subjects = [rows[rows[:, 1] == subject, 0].tolist() for subject in np.unique(rows[:, 1])]
    return float(aggregate_subtask_metrics([mean(one) for one in subjects], [len(one) for one in subjects]))


def _reported(
    names: Sequence[str], found: Mapping[str, Mapping[str | None, Measurement]], adapter: str | None
) -> dict[str, float]:
    """Value and standard error of every task and of the whole, by the harness' own functions."""
    said: dict[str, float] = {}
    for metric, measured in found.items():
        rows = measured[adapter].rows
        by_task = {name: rows[rows[:, 1] == at, 0].tolist() for at, name in enumerate(names)}
        for name, values in by_task.items():
            if values:
                said[f"{name} {metric}"] = float(mean(values))
            if len(values) > 1:
                said[f"{name} {metric}_stderr"] = float(mean_stderr(values))
        said[metric] = _whole(rows)
        sizes = [len(values) for values in by_task.values() if values]
        if min(sizes) > 1:  # one item of a subject has no error, so the whole has none
            errors = [said[f"{name} {metric}_stderr"] for name, values in by_task.items() if values]
            said[f"{metric}_stderr"] = float(pooled_sample_stderr(errors, sizes)) if len(errors) > 1 else errors[0]
    return said


def _definitions(suite: Suite) -> TaskManager:
    # The whole of the harness has thousands of definitions, and reading them all takes half a minute.
    return TaskManager(include_defaults=False, include_path=str(_DEFINITIONS / suite.folder))


def _from_hub(suite: Suite) -> dict[str, Any]:
    """The harness' own tasks on the dataset they name."""
    try:
        tasks: dict[str, Any] = _definitions(suite).load([suite.group])["tasks"]
    except Exception as error:
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        raise NotMeasured(f"its data cannot be had from the hub ({cause}); name local files by `data`") from error
    return tasks


def _from_files(suite: Suite, data: Path) -> dict[str, Any]:
    """The harness' own tasks on local files: those subjects of which every split is there."""
    subjects = _subjects(suite, data)
    specs = []
    for subject, paths in subjects.items():
        splits = {split: datasets.Dataset.from_list(list(suite.read(path))) for split, path in paths.items()}

        def local(splits: Mapping[str, Any] = splits, **_: Any) -> Mapping[str, Any]:
            return splits

        specs.append({"task": suite.prefix + subject if suite.prefix else suite.group, "custom_dataset": local})
    try:
        # Only as members of a group are definitions taken with changes.
        tasks: dict[str, Any] = _definitions(suite).load([{"group": "local", "task": specs}])["tasks"]
    except NotMeasured:
        raise
    except Exception as error:
        raise NotMeasured(f"{data}: the harness does not take it ({str(error).strip()[:200]})") from error
    return tasks


def _subjects(suite: Suite, data: Path) -> dict[str, dict[str, Path]]:
    """Files by subject and split.

    Raises:
        NotMeasured: there are none.
    """
    if not data.exists():
        raise NotMeasured(f"{data}: is not there; see options.data")
    if not suite.prefix:
        (split, name), *_ = suite.files.items()
        path = data / name if data.is_dir() else data
        return {"": {split: path}} if path.is_file() else _none(data, name)
    known = set(_definitions(suite).all_subtasks)
    found: dict[str, dict[str, Path]] = {}
    for split, pattern in suite.files.items():
        folder, _, name = pattern.partition("/")
        before, after = name.split("{}")
        for path in sorted((data / folder).glob(f"{before}*{after}")):
            subject = path.name[len(before) : -len(after)]
            if suite.prefix + subject in known:
                found.setdefault(subject, {})[split] = path
    whole = {subject: paths for subject, paths in sorted(found.items()) if len(paths) == len(suite.files)}
    return whole or _none(data, " and ".join(suite.files.values()).replace("{}", "SUBJECT"))


def _none(data: Path, wanted: str) -> dict[str, dict[str, Path]]:
    raise NotMeasured(f"{data}: no {wanted} in it; see evaluation/harness.py for the form of each suite")


def _versions(tasks: Mapping[str, Any]) -> str:
    return "+".join(sorted({str(task.VERSION) for task in tasks.values()}))


def _digest(tasks: Mapping[str, Any]) -> str:
    """Of every document that may be asked: the same data have the same name, wherever they came from."""
    digest = sha256()
    for name in sorted(tasks):
        digest.update(name.encode())
        for doc in tasks[name].eval_docs:
            digest.update(json.dumps(doc, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness draws bars and tells of each task; here one line a gate is enough."""
    logger, bars = logging.getLogger("lm_eval"), datasets.utils.logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
