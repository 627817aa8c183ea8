"""Runs the API: in the foreground until a signal, or beside something else for as long as a `with` lasts."""

from __future__ import annotations

import contextlib
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import structlog
import uvicorn
from fastapi import FastAPI

from serving.access import Access, is_loopback
from serving.api import Parts, create_app
from serving.connection import HEAD_BYTES_MAX, Connection
from serving.errors import ServingError
from serving.gate import check_classified
from serving.swap import HotSwap

# Answers on their way may finish; a stuck one must not keep the process for ever.
GRACE_S = 30
START_S = 30

log = structlog.get_logger()


def _nothing() -> None:
    pass


def serve(
    swaps: Sequence[HotSwap],
    *,
    host: str,
    port: int,
    answer_key: bytes,
    on_end: Callable[[], object] = _nothing,
    **parts: Unpack[Parts],
) -> None:
    """Serve until SIGINT or SIGTERM: no new requests, answers on their way finish, then everything stops.

    Args:
        swaps: one a stream.
        host: to listen at.
        port: to listen at.
        answer_key: secret of the answer ids.
        on_end: told when the end begins: what never finishes by itself, such as a stream of events, ends then.
        parts: for `create_app`; where other machines reach the host, `access` must ask for keys.

    Raises:
        ServingError: the address cannot be bound, or needs keys and there are none.
    """
    app = _application(swaps, answer_key, host, parts)
    with bound(host, port) as listener, _settled(), _following(swaps):
        log.info("serving", address=f"http://{host}:{listener.getsockname()[1]}", streams=[s.stream for s in swaps])
        server = uvicorn.Server(_config(app))
        with _ending(server, on_end):
            server.run(sockets=[listener])
    log.info("stopped serving")


@contextlib.contextmanager
def running(
    swaps: Sequence[HotSwap],
    *,
    answer_key: bytes,
    host: str = "127.0.0.1",
    port: int = 0,
    on_end: Callable[[], object] = _nothing,
    **parts: Unpack[Parts],
) -> Iterator[str]:
    """Serve on a thread while the block runs; gives the address. Port 0 takes a free one.

    Engines are not closed: whoever made them does. The arguments are those of `serve`.

    Raises:
        ServingError: the address cannot be bound, needs keys and there are none, or the server does not start.
    """
    app = _application(swaps, answer_key, host, parts)
    with bound(host, port) as listener, _settled():
        server = uvicorn.Server(_config(app))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="api", daemon=True)
        for swap in swaps:
            swap.start()
        thread.start()
        try:
            end = time.monotonic() + START_S
            while not server.started:
                if not thread.is_alive() or time.monotonic() > end:
                    raise ServingError(f"address={host}:{port}: the server did not start; its log says why")
                time.sleep(0.01)
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            on_end()
            thread.join()
            for swap in swaps:
                swap.stop()


def _application(swaps: Sequence[HotSwap], answer_key: bytes, host: str, parts: Parts) -> FastAPI:
    """The application, where it may be served.

    Raises:
        ServingError: other machines reach the address and no keys are asked for, keys are asked for and there is none,
            or a route says nothing of who may call it.
    """
    access = parts.get("access") or Access()
    if not access.required and not is_loopback(host):
        raise ServingError(f"api.host={host}: other machines reach it, so keys must be asked for; or use 127.0.0.1")
    access.check_some(host)
    app = create_app(swaps, answer_key, **parts)
    check_classified(app)
    return app


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """Spare the garbage collector what was there before the first request.

    Going through the libraries' half a million objects every few thousand requests stopped all answers for a quarter of
    a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _ending(server: uvicorn.Server, on_end: Callable[[], object]) -> Iterator[None]:
    """Signals end the server and nothing else: uvicorn raises them again when it is done, which would kill us there."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: object) -> None:
        server.should_exit = True
        on_end()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _following(swaps: Sequence[HotSwap]) -> Iterator[None]:
    """Swaps follow the registry while the block runs; then they stop, and their engines with them."""
    try:
        for swap in swaps:
            swap.start()
        yield
    finally:
        for swap in swaps:
            swap.stop()
        for engine in {id(swap.engine): swap.engine for swap in swaps}.values():
            engine.close()


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening address, taken before anything slow begins."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"api={host}:{port}: cannot be bound ({error.strerror}); stop what uses it or change service.api.port"
            ) from error
        yield listener


def _config(app: Any) -> uvicorn.Config:
    # No access log: a line a request says nothing the metrics do not. No logging set-up: that is the application's.
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=HEAD_BYTES_MAX,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        lifespan="off",
    )
