"""A server with two streams for the tests of the API: `desk` on an approved version, `bare` on the base."""

import time
from contextlib import contextmanager

import httpx

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
