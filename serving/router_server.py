"""Runs a router: in the foreground until a signal, or beside something else for as long as a `with` lasts."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import structlog
from aiohttp import web

from serving.bounds import HEAD_S_MAX
from serving.errors import ServingError
from serving.router import BODY_BYTES_MAX, Router
from serving.server import GRACE_S, START_S, bound

# Behind one address may stand hundreds of clients.
BACKLOG = 1024
# So long the rest of a refused body is read, so that whoever sends it gets to read why.
LINGER_S = 2.0

log = structlog.get_logger()


def route(make: Callable[[], Router], *, host: str, port: int) -> None:
    """Route until SIGINT or SIGTERM: no new requests, answers on their way finish, then everything stops.

    Args:
        make: the router.
        host: to listen at.
        port: to listen at.

    Raises:
        ServingError: the address cannot be bound.
    """
    with bound(host, port) as listener:
        asyncio.run(_until_signal(make(), listener))
    log.info("stopped routing")


@contextlib.contextmanager
def routing(make: Callable[[], Router], *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Route on a thread while the block runs; gives the address. Port 0 takes a free one.

    Raises:
        ServingError: the address cannot be bound, or the router does not start.
    """
    started, failures = threading.Event(), list[BaseException]()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def run(listener: socket.socket) -> None:
        async with _listening(make(), listener):
            started.set()
            await ended.wait()

    def work(listener: socket.socket) -> None:
        try:
            loop.run_until_complete(run(listener))
        except BaseException as error:  # noqa: BLE001 - told to whoever waits for the start
            failures.append(error)
        finally:
            loop.close()
            started.set()

    with bound(host, port) as listener:
        thread = threading.Thread(target=work, args=(listener,), name="router", daemon=True)
        thread.start()
        if not started.wait(START_S) or failures:
            raise ServingError(f"router={host}:{port}: did not start ({failures or 'too slow'})")
        try:
            yield f"http://{host}:{listener.getsockname()[1]}"
        finally:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(ended.set)
            thread.join()


async def _until_signal(router: Router, listener: socket.socket) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    async with _listening(router, listener):
        host, port = listener.getsockname()[:2]
        log.info("routing", address=f"http://{host}:{port}", replicas=[replica.url for replica in router.replicas])
        await ended.wait()


@contextlib.asynccontextmanager
async def _listening(router: Router, listener: socket.socket) -> AsyncIterator[None]:
    """The router follows its replicas, and answers."""
    await router.start()
    # A client that hangs up cancels its handler, and so the request to the replica.
    server = web.Server(
        router.handle,
        access_log=None,
        handler_cancellation=True,
        request_factory=_request,
        max_field_size=16_384,
        keepalive_timeout=HEAD_S_MAX,  # it closes while no whole head has come
        lingering_time=LINGER_S,
    )
    runner = web.ServerRunner(server, shutdown_timeout=GRACE_S)
    try:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        yield
    finally:
        router.end()
        await runner.cleanup()
        await router.stop()


def _request(message, payload, protocol, writer, task):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """A request whose body is bounded; aiohttp's own signature."""
    loop = asyncio.get_running_loop()
    return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=BODY_BYTES_MAX)
