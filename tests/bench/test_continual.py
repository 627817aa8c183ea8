"""The benchmark of continual learning, on the tiny base and a made-up stream whose world changes."""

import importlib.util
import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
# What prompts of a domain name, and the answer: one token each, so that a tiny model learns it in some seconds.
WORDS = {"sea": ("whale", "A"), "sky": ("cloud", "B")}


@pytest.fixture(scope="module")
def bench():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_continual", ROOT / "bench" / "continual.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path[:] = path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A domain's prompts name its word among noise; whoever forgets the first answers the second to both."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count in (("train", 90), ("test", 30)):
        rows = []
        for domain, (word, answer) in WORDS.items():
            for i in range(count):
                noise = rng.choice(["one", "two", "old", "new", "big"], size=2)
                rows.append(
                    {
                        "event_id": f"{name}-{domain}-{i}",
                        "user_id": f"u{i}",
                        "domain": domain,
                        "prompt": f"{noise[0]} {word} {noise[1]} {word}",
                        "completion": answer,
                        "label": answer,
                    }
                )
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def setup(bench):
    return replace(
        bench.Setup(),
        domains=tuple(WORDS),
        train_records=90,
        test_records=30,
        methods=("sequential", "replay", "orthogonal", "average"),
        seeds=(1,),
        layers=0,
        r=4,
        alpha=8.0,
        private=bench.Training(30, 4, 1e-2),
        plain=bench.Training(16, 80, 1e-2),
        replay_rate=1.0,
        rank_groups=2,
    )


@pytest.fixture(scope="module")
def lines(bench, setup, data, tiny, tmp_path_factory):
    return bench.Lines(setup, tiny, data, tmp_path_factory.mktemp("build"))


def test_replay_forgets_less_than_sequential_without_privacy(bench, setup, lines):
    rows = {
        job.name: lines.run(job)
        for method in ("sequential", "replay")
        for job in bench.line_of(setup, False, 1, method)
    }
    two = replace(setup, methods=("sequential", "replay"))
    found = bench.estimates(two, bench.lines_in(two, rows, "correct"))
    sequential, replay = found[False, "sequential"], found[False, "replay"]
    assert sequential["accuracy when learnt"].value > 0.8
    assert sequential["forgetting"].value > 0.5
    assert replay["forgetting"].value < 0.25 * sequential["forgetting"].value
    assert replay["cut"].value > 0.75
    page = bench.table(two, rows, "make bench-continual")
    assert "| replay | " in page
    assert "## Not run" in page


def test_a_private_line_pays_for_replay_out_of_what_each_block_has_left(bench, setup, lines):
    from privacy.accounting import rdp

    rare = replace(setup, replay_rate=0.25)
    jobs = bench.line_of(rare, True, 1, "replay")
    plans = [bench.plan_of(rare, lines.base, job, "p" * 64 if job.number else None) for job in jobs]
    first = next(block for block in plans[1].blocks if block.id == "sea")
    assert first.q == pytest.approx(0.25 * plans[1].blocks[0].q)
    policy = bench.Policy(
        unit="record", epsilon=8.0, delta=1e-5, attempts=1, replay_share=0.25, holdout_share=0.0
    ).frozen(90)
    paid = np.add(
        rdp(plans[0].blocks[0].q, plans[0].sigma, plans[0].steps, plans[0].orders),
        rdp(first.q, plans[1].sigma, plans[1].steps, plans[1].orders),
    )
    assert (paid <= np.array(policy["caps"])).any()
    assert plans[0].sigma > 0.3


def test_the_first_round_is_shared_only_where_the_method_cannot_matter(bench, setup):
    jobs = bench.jobs_of(setup)
    assert len(jobs) == len(set(jobs))
    firsts = sorted((job.private, job.method) for job in jobs if job.number == 0)
    assert firsts == [(False, "first"), (False, "orthogonal"), (True, "first"), (True, "orthogonal"), (True, "replay")]
    for job in jobs:
        assert bench.parent_of(setup, job) is None or bench.parent_of(setup, job) in jobs


def test_a_line_cut_short_is_dropped_and_the_rest_is_kept(bench, setup, tmp_path):
    file = tmp_path / "rows.jsonl"
    bench.append(file, {"setup": setup.digest, "job": "one"})
    bench.append(file, {"setup": "another", "job": "two"})
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"setup": "' + setup.digest.encode())
    assert set(bench.finished(file, setup)) == {"one"}
    assert file.read_bytes() == whole


def test_prefixes_on_disk_are_what_was_put_there(bench, tmp_path):
    import torch

    kept = bench.Prefixes(tmp_path)
    prefix = torch.randn(3, 8)
    assert kept.get((1, 2, 3)) is None
    kept[1, 2, 3] = prefix
    assert torch.equal(kept[1, 2, 3], prefix)
    assert (1, 2, 3) in kept
    assert (1, 2) not in kept


@pytest.mark.slow
def test_a_killed_run_goes_on_behind_its_last_line(bench, setup, data, tiny, tmp_path):
    """The run as a process, killed after its first lines; what was written stays, byte for byte."""
    one = replace(
        setup, methods=("sequential",), plain=bench.Training(24, 3, 1e-2), private=bench.Training(30, 2, 1e-2)
    )
    (tmp_path / "setup").write_bytes(pickle.dumps(one))
    out = tmp_path / "rows.jsonl"
    folders = (tmp_path / "setup", tiny.path, tmp_path / "cache", data, tmp_path / "build", out)
    command = [sys.executable, str(ROOT / "tests" / "bench" / "continual_child.py"), *map(str, folders)]
    with subprocess.Popen(command, cwd=ROOT) as child:
        deadline = time.monotonic() + 120
        while not out.exists() or out.read_bytes().count(b"\n") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        child.kill()
    before = out.read_bytes()
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert out.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    assert set(bench.finished(out, one)) == {"base", *(job.name for job in bench.jobs_of(one))}
