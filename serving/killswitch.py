"""The kill switch of a stream: while its file is there, the bare base answers, whatever the registry wants.

It is looked at by every request, so that it takes hold at once, also while the registry hangs, and outlives restarts.
It needs no signature: the base holds nobody's data, and what comes back afterwards is what was approved before.

killed-STREAM.json     who, why, at; a file that cannot be read is a switch that is on
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from serving.cache import read_json, write_json
from serving.errors import SwapError


class KillSwitch:
    """The switch of one stream.

    Args:
        folder: of what its server keeps on disk; shared by all replicas.
        stream: its name.
    """

    def __init__(self, folder: Path, stream: str) -> None:
        self.stream = stream
        self._file = folder / f"killed-{stream}.json"

    @property
    def on(self) -> bool:
        """Whether the bare base is to answer. One stat: cheap enough for every request."""
        try:
            os.stat(self._file)  # noqa: PTH116 - ten times a Path's own
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    @property
    def why(self) -> Mapping[str, str]:
        """Who switched it on, why, and when; empty when it is off or its file says nothing."""
        try:
            return {name: str(value) for name, value in (read_json(self._file) or {}).items()}
        except SwapError:
            return {}

    def kill(self, *, who: str, why: str, at: str) -> None:
        """Switch it on; durable when this returns.

        Raises:
            SwapError: the disk does not take it.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, {"who": who, "why": why, "at": at})

    def end(self) -> bool:
        """Switch it off; False: it was off."""
        try:
            self._file.unlink()
        except FileNotFoundError:
            return False
        return True

    def sentence(self) -> str:
        """What an alarm says while it is on."""
        told = self.why
        who, at = told.get("who", "unknown"), told.get("at", "unknown")
        return (
            f"stream={self.stream}: the kill switch is on since {at} ({who}: {told.get('why', 'no reason given')}); "
            f"the bare base answers; when it may end: tidegate unkill {self.stream} --why ..."
        )
