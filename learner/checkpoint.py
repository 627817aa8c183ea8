"""Checkpoints of a running round: written whole or not at all, and good for that round only.

A checkpoint names the hashes of plan, data, base and code. Continuing under other hashes would be another mechanism on
the same charge, so it is refused: the way on is a new attempt, charged in full.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from learner.errors import ResumeRefused
from learner.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

FILE = "round.safetensors"
_TENSORS = ("theta", "first", "second")


@dataclass(frozen=True)
class Checkpoint:
    """A round after `step` steps: weights, AdamW's moments, and the threads and precision its arithmetic depends on.

    With early stopping also what was seen so far (`stopping`, its own JSON) and the weights that scored best.
    """

    step: int
    threads: int
    precision: Precision
    theta: Tensor
    first: Tensor
    second: Tensor
    best: Tensor | None = None
    stopping: str = ""


def save(folder: Path, checkpoint: Checkpoint, context: Mapping[str, str]) -> None:
    """Write to a temporary file, fsync, rename, fsync the folder: a crash leaves the old one or the new one."""
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    numbers = {"step": str(checkpoint.step), "threads": str(checkpoint.threads), "stopping": checkpoint.stopping}
    numbers["precision"] = checkpoint.precision
    tensors = {name: getattr(checkpoint, name) for name in _TENSORS}
    if checkpoint.best is not None:
        tensors["best"] = checkpoint.best
    content = to_bytes(tensors, {**_prefixed(context), **numbers})
    new = folder / f"{FILE}.new"
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / FILE)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(folder: Path, context: Mapping[str, str]) -> Checkpoint | None:
    """The checkpoint in `folder`, or None when the round has not written one yet.

    Raises:
        ResumeRefused: it belongs to another plan, data, base or code, or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            best = file.get_tensor("best") if "best" in file.keys() else None  # noqa: SIM118 - no mapping
        step, threads = int(metadata["step"]), int(metadata["threads"])
        precision = next(name for name in get_args(Precision) if name == metadata["precision"])
    except (SafetensorError, OSError, KeyError, ValueError, StopIteration) as error:
        raise ResumeRefused(
            f"checkpoint {path}: cannot be read ({error!r}); remove it to redo the round from its first step"
        ) from error
    for name, value in _prefixed(context).items():
        if metadata.get(name) != value:
            raise ResumeRefused(f"checkpoint {path}: {name}={metadata.get(name)}, must be {value}; start a new attempt")
    stopping = metadata.get("stopping", "")
    return Checkpoint(step=step, threads=threads, precision=precision, best=best, stopping=stopping, **tensors)


def discard(folder: Path) -> None:
    """Remove a finished round's checkpoint."""
    for name in (FILE, f"{FILE}.new"):
        (folder / name).unlink(missing_ok=True)


def _prefixed(context: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}_sha256": value for name, value in context.items()}
