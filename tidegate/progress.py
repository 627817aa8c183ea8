"""Progress of long commands: a bar on a terminal, now and then a line elsewhere; always on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[str, int, int], None]

# Often enough that nobody believes it hangs, seldom enough for a log.
LINE_SECONDS = 20.0


@contextmanager
def bar(*, quiet: bool = False) -> Iterator[Tell]:
    """Yield `tell(what, done, of)`: each `what` gets a bar of its own, with time left."""
    if quiet:
        yield lambda _what, _done, _of: None
    elif not sys.stderr.isatty():
        yield _lines()
    else:
        with _bars() as tell:
            yield tell


def _lines() -> Tell:
    told_at = time.monotonic()

    def tell(what: str, done: int, of: int) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= LINE_SECONDS:
            sys.stderr.write(f"{what}: {done} of {of}\n")
            sys.stderr.flush()
            told_at = time.monotonic()

    return tell


@contextmanager
def _bars() -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as view:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = view.add_task(what, total=of)
            view.update(tasks[what], completed=done, total=of)

        yield tell
