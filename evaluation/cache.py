"""What a model said to public questions, kept between evaluations, so that live and the base are asked once.

An entry is named by everything the answer depends on: the adapter's sha256, what was asked (the prompts and labels of a
gate set, by their sha256; greedy answers are kept by prompt), and the version of how it is asked (base, system prompt,
code). It is one file, written
whole or not at all, readable by its owner only. One that is damaged is as good as none: what it held is asked again.

Whoever may write these files may write the workspace's keys as well; they are no more trusted than that.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from privacy.canonical import sha256_of

# Some hundred versions of a stream with ten questions each; the oldest go first.
ENTRIES_MAX = 2000

# What reading a damaged archive raises, whichever byte it is.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    NotImplementedError,  # zipfile, of a compression it does not know
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)

log = structlog.get_logger()


@dataclass(frozen=True)
class Entry:
    """What was said.

    Attributes:
        scores: of labels; None where none were asked for.
        answers: greedy ones by their prompts; None where none were asked for.
    """

    scores: NDArray[np.float64] | None = None
    answers: Mapping[str, str] | None = None


class Cache:
    """Entries in a folder.

    Args:
        folder: made when it is first written to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: Mapping[str, Any]) -> Entry | None:
        """What is kept under a key; None when nothing is, or when it is damaged."""
        path = self._path(key)
        try:
            entry, about = _read(path.read_bytes())
        except FileNotFoundError:
            return None
        except _DAMAGE as error:
            log.warning("kept answers are damaged and are asked again", file=path.name, problem=type(error).__name__)
            return None
        if about["key"] != json.loads(json.dumps(dict(key))) or about["sha256"] != _digest(entry):
            log.warning("kept answers are damaged and are asked again", file=path.name, problem="another digest")
            return None
        return entry

    def put(self, key: Mapping[str, Any], entry: Entry) -> None:
        """Keep an entry; a disk that is full costs nothing but the next evaluation's time."""
        answers = None if entry.answers is None else dict(entry.answers)
        about = {"key": dict(key), "answers": answers, "sha256": _digest(entry)}
        arrays: dict[str, NDArray[Any]] = {"about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)}
        if entry.scores is not None:
            arrays["scores"] = entry.scores
        out = BytesIO()
        np.savez_compressed(out, allow_pickle=False, **arrays)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(self._path(key), out.getvalue())
            self._forget()
        except OSError as error:
            log.warning("answers are not kept", problem=type(error).__name__)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self._folder / f"{sha256_of(dict(key))}.npz"

    def _forget(self) -> None:
        """Delete the oldest entries beyond ENTRIES_MAX."""
        entries = list(self._folder.glob("*.npz"))
        for path in sorted(entries, key=lambda path: path.stat().st_mtime)[:-ENTRIES_MAX]:
            path.unlink(missing_ok=True)


def _read(content: bytes) -> tuple[Entry, dict[str, Any]]:
    with np.load(BytesIO(content), allow_pickle=False) as kept:
        about = json.loads(kept["about"].tobytes())
        answers = None if about["answers"] is None else dict(about["answers"])
        return Entry(kept.get("scores"), answers), {"key": about["key"], "sha256": about["sha256"]}


def _digest(entry: Entry) -> str:
    digest = sha256(json.dumps(entry.answers, sort_keys=True).encode())
    if (scores := entry.scores) is not None:
        digest.update(repr((scores.shape, scores.dtype.str)).encode() + np.ascontiguousarray(scores).tobytes())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all; mode 0600, which is what mkstemp gives."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
