"""`tidegate demo`: the whole path on the example stream."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option("--directory", type=click.Path(path_type=Path), default="workspace/demo", show_default=True)
@click.option("--keep", is_flag=True, help="Leave everything running at the end, until Ctrl-C.")
def demo(directory: Path, *, keep: bool) -> None:
    """Stream the example records, run two private rounds, approve, ask, roll back, audit; then a summary.

    Starts from nothing each time: DIRECTORY is made anew (a prepared base model is kept).
    """
    from tidegate import log
    from tidegate.demo import run

    log.configure()
    run(directory, keep=keep)
