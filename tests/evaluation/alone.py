"""lm-evaluation-harness by itself: its own tasks on files it reads itself, its own HFLM, peft's adapter."""

import gc
import warnings
from pathlib import Path

import datasets
import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from learner.base import load_tokenizer

DEFINITIONS = Path(lm_eval.__file__).parent / "tasks"


def hflm(base, adapter=None, *, batch=1, max_length=None):
    peft = {} if adapter is None else {"peft": str(adapter)}
    return HFLM(
        pretrained=str(base.path),
        tokenizer=load_tokenizer(base),  # AutoTokenizer would force Qwen2's split on any base
        device="cpu",
        dtype="float32",
        batch_size=batch,
        max_length=max_length,
        **peft,
    )


def csv(task, columns, files, cache):
    """A task of the harness on csv files, read by `datasets`."""
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    read = {"data_files": files, "features": features, "keep_default_na": False, "cache_dir": str(cache)}
    return {"task": task, "dataset_path": "csv", "dataset_name": None, "dataset_kwargs": read}


def run(model, folder, specs, *, shots=0, samples=None, metrics=("acc", "acc_norm")):
    """What `lm_eval` reports: by task, and of all of them as the group "alone"."""
    # `datasets` leaves the files it reads to the garbage collector: have them collected here, where it is allowed.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        results = _run(model, folder, specs, shots, samples, metrics)
        gc.collect()
    return results


def _run(model, folder, specs, shots, samples, metrics):
    together = [{"metric": metric, "weight_by_size": True, "aggregation": "mean"} for metric in metrics]
    return lm_eval.simple_evaluate(
        model=model,
        # The outermost group of a call hands its own keys down to its tasks, which refuse them: so one more around it.
        tasks=[{"group": "all", "task": [{"group": "alone", "task": specs, "aggregate_metric_list": together}]}],
        num_fewshot=shots,
        samples=samples,
        task_manager=TaskManager(include_defaults=False, include_path=str(DEFINITIONS / folder)),
        bootstrap_iters=1,
    )


def samples_of(names):
    """The harness' `samples` for items as `Asked` names them."""
    found = {}
    for name in names:
        task, _, index = name.rpartition(" ")
        found.setdefault(task, []).append(int(index))
    return {task: sorted(indices) for task, indices in found.items()}


def differences(results, reported, metrics, *, group=True):
    """Every figure of the harness beside ours: (name, theirs, ours)."""
    whole = "all::alone"
    rows = []
    for task, said in results["results"].items():
        for metric in metrics:
            for kind in (metric, f"{metric}_stderr"):
                ours = kind if task == whole else f"{task} {kind}"
                if said.get(f"{kind},none", "N/A") != "N/A" and (group or task != whole):
                    rows.append((ours, said[f"{kind},none"], reported[ours]))
    return rows


def _responses(results):
    return [reply for docs in results["samples"].values() for doc in docs for reply in doc["filtered_resps"]]


def likelihoods(results):
    """Of every request, in the harness' order."""
    return [likelihood for likelihood, _ in _responses(results)]


def greedy(results):
    """Of every request, whether greedy decoding would say it."""
    return [said for _, said in _responses(results)]
