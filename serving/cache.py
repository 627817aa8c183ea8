"""What a stream's server keeps on disk, so that it needs nobody to start: the live approval and recent adapters.

live-STREAM.json       the signed approval that is followed now; its seq is never gone below; one for each replica
emergency-STREAM.json  a signed approval of kind emergency, left by `tidegate rollback --emergency`
canary-STREAM.json     the newest decision on a canary that was seen, and one that was stepped back from; the same
adapters/SHA256/       recent adapters; the name is checked against the content before each use
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from learner.adapter import BYTES_MAX, adapter_sha256
from learner.errors import LearnerError
from serving.errors import SwapError

# Adapters are a few MB; an emergency rollback reaches back this far.
KEPT_ADAPTERS = 20
# What is larger is not even hashed; its configuration comes on top of the weights.
ADAPTER_BYTES_MAX = BYTES_MAX + (1 << 20)


class LocalCache:
    """The cache folder of one stream.

    Args:
        folder: made when missing.
        stream: its name.
        replica: which of several servers on this folder; they share adapters and emergencies, not what is live.
    """

    def __init__(self, folder: Path, stream: str, replica: str = "") -> None:
        self._adapters = folder / "adapters"
        self._adapters.mkdir(parents=True, exist_ok=True)
        self._live = folder / f"live-{stream}{replica and f'-{replica}'}.json"
        self._emergency = folder / f"emergency-{stream}.json"
        self._canary = folder / f"canary-{stream}{replica and f'-{replica}'}.json"

    def live(self) -> Mapping[str, Any] | None:
        """The signed approval that was followed last.

        Raises:
            SwapError: the file is damaged.
        """
        return read_json(self._live)

    def remember(self, signed: Mapping[str, Any]) -> None:
        """Keep the signed approval that is followed from now on; durable when this returns.

        Raises:
            SwapError: the disk does not take it.
        """
        write_json(self._live, signed)

    def emergency(self) -> Mapping[str, Any] | None:
        """The signed emergency approval, if one was left.

        Raises:
            SwapError: the file is damaged.
        """
        return read_json(self._emergency)

    def end_emergency(self, seq: int) -> None:
        """Remove the emergency approval of that number: a later decision has overtaken it. A newer one stays."""
        with suppress(SwapError):
            if (self.emergency() or {}).get("seq") == seq:
                self._emergency.unlink(missing_ok=True)

    def canary(self) -> Mapping[str, Any] | None:
        """What was noted of canaries.

        Raises:
            SwapError: the file is damaged.
        """
        return read_json(self._canary)

    def note_canary(self, noted: Mapping[str, Any]) -> None:
        """Note it; durable when this returns.

        Raises:
            SwapError: the disk does not take it.
        """
        write_json(self._canary, noted)

    def adapter(self, sha256: str) -> Path | None:
        """The folder of a cached adapter whose content is what its name says, or None."""
        folder = self._adapters / sha256
        try:
            if adapter_sha256(folder) != sha256:
                return None
        except LearnerError:
            return None
        with suppress(OSError):
            os.utime(folder)  # recently used: kept longer
        return folder

    def take(self, sha256: str, fetch: Callable[[Path], Path]) -> Path:
        """Fetch an adapter and keep it, if it is the one that is expected.

        Raises:
            SwapError: it cannot be fetched, is incomplete, or is another one.
        """
        work = Path(tempfile.mkdtemp(prefix=".fetching-", dir=self._adapters))
        try:
            try:
                got = fetch(work / "adapter")
            except Exception as error:  # the caller's function: whatever it is, the live version goes on
                raise SwapError(f"adapter {sha256[:12]}: cannot be fetched ({error}); check the registry") from error
            size = sum(file.stat().st_size for file in got.iterdir())
            if size > ADAPTER_BYTES_MAX:
                raise SwapError(
                    f"adapter {sha256[:12]}: {size} bytes, must be <= {ADAPTER_BYTES_MAX}; a LoRA adapter is smaller, "
                    "check what was registered, or approve another version"
                )
            try:
                found = adapter_sha256(got)
            except LearnerError as error:
                raise SwapError(f"adapter {sha256[:12]}: {error}") from error
            if found != sha256:
                raise SwapError(
                    f"adapter sha256={found[:12]}: must be {sha256[:12]} as approved; "
                    "it was changed after it was approved: restore it, or approve another version"
                )
            final = self._adapters / sha256
            whole = work / "whole"
            shutil.copytree(got, whole)
            if self.adapter(sha256) is None:  # another replica may have put it there meanwhile, and be reading it
                shutil.rmtree(final, ignore_errors=True)  # a damaged one of that name
                with suppress(OSError):
                    whole.replace(final)
            if self.adapter(sha256) is None:
                raise SwapError(f"adapter {sha256[:12]}: what was kept is damaged; check the disk")
        except OSError as error:
            raise SwapError(f"adapter {sha256[:12]}: cannot be kept ({error}); check the disk") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return final

    def prune(self, needed: Collection[str]) -> None:
        """Remove the adapters longest unused, beyond KEPT_ADAPTERS and those needed."""
        folders = [folder for folder in self._adapters.iterdir() if not folder.name.startswith(".")]
        folders.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for folder in folders[KEPT_ADAPTERS:]:
            if folder.name not in needed:
                shutil.rmtree(folder, ignore_errors=True)


def write_emergency(folder: Path, stream: str, signed: Mapping[str, Any]) -> Path:
    """Leave a signed emergency approval where the stream's server looks; returns the file.

    Raises:
        SwapError: the disk does not take it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"emergency-{stream}.json"
    write_json(file, signed)
    return file


def read_json(file: Path) -> Mapping[str, Any] | None:
    """A JSON object from disk, None when there is no file.

    Raises:
        SwapError: the file is damaged.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SwapError(f"{file}: cannot be read ({error}); remove it, the registry will be asked anew") from error
    if not isinstance(value, dict):
        raise SwapError(f"{file}: is no JSON object; remove it, the registry will be asked anew")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Atomic and durable: whole old or whole new, also after a power cut.

    Raises:
        SwapError: the disk does not take it.
    """
    new = file.with_suffix(".new")
    try:
        with new.open("w", encoding="utf-8") as out:
            json.dump(value, out, indent=2, sort_keys=True)
            out.flush()
            os.fsync(out.fileno())
        new.replace(file)
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SwapError(f"{file}: cannot be written ({error}); check the disk") from error
