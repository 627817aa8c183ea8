"""A server with two streams for the tests of the API: `desk` on an approved version, `bare` on the base."""

import signal
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import structlog

from learner.base import prepare_base
from privacy.signing import SigningKey
from serving.server import running
from serving.swap import HotSwap
from tests.serving.registry import MODEL, Registry, trusted

ANSWER_KEY = b"k" * 32


@contextmanager
def served(engine, adapter, folder, **more):
    """The address of a running server.

    Args:
        engine: answers both streams.
        adapter: folder of version 7 of `desk`.
        folder: where it may keep things.
        more: for `running`.
    """
    signer = SigningKey.load_or_create(folder / "approvals.pem")
    registry = Registry(signer, {7: adapter})
    registry.promote(7)
    plain = {"fetch": registry.fetch, "acknowledge": registry.acknowledge, "trusted": trusted(signer)}
    swap = HotSwap(MODEL, engine, wanted=registry.wanted, cache=folder / "cache", **plain)
    bare = HotSwap("bare", engine, wanted=lambda: None, cache=folder / "bare", **plain)
    with running([swap, bare], answer_key=ANSWER_KEY, **more) as url:
        end = time.monotonic() + 60
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        yield url


def main(base, adapter, folder):
    """Serve until a signal; the first line of output is the address. Answers are short: many requests, small cost."""
    from serving.inprocess import InProcessEngine

    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    folder = Path(folder)
    with (
        InProcessEngine(prepare_base(base, folder / "bases"), batch_max=8, queue_max=64, context_max=512) as engine,
        served(engine, Path(adapter), folder, max_tokens={MODEL: 4, "bare": 4}) as url,
    ):
        print(url, flush=True)  # noqa: T201 - whoever started it reads it
        ending.wait()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    main(*sys.argv[1:])
