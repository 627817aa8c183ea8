"""Runs the benchmark of continual learning as a process that may be killed: SETUP.pickle BASE CACHE DATA BUILD OUT."""

import importlib.util
import pickle
import sys
from pathlib import Path

# Workers import this file again before anything is unpickled: the benchmark must be loaded outside of `main`.
spec = importlib.util.spec_from_file_location(
    "bench_continual", Path(__file__).resolve().parents[2] / "bench" / "continual.py"
)
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench
spec.loader.exec_module(bench)


def main() -> None:
    from learner.base import prepare_base

    setup, base, cache, data, build, out = map(Path, sys.argv[1:])
    settings = pickle.loads(setup.read_bytes())  # noqa: S301 - the test itself wrote it
    bench.run(settings, prepare_base(str(base), cache), data, build, out, 1, ["base", *bench.jobs_of(settings)])


if __name__ == "__main__":
    main()
