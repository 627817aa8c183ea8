"""Token ids to text, piece by piece: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

# What decoding puts for bytes that are no character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one answer as its tokens come in.

    The pieces put together are the decoded ids, cut before the first stop text: streaming and not streaming cannot
    differ, because both read this.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, used by one thread only.
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        # Both stand on character boundaries. One token before `_read` is decoded again,
        # because some tokenizers write a first token without its leading space.
        self._prefix = 0
        self._read = 0
        self._shown = 0  # characters behind `_prefix` that were given out
        self._held = ""
        self._released = 0
        self.stopped = False

    @property
    def begun(self) -> int:
        """Characters that the tokens so far have written for sure, shown or held back: where the next one begins."""
        return self._released + len(self._held)

    @property
    def released(self) -> int:
        """Characters given out."""
        return self._released

    def push(self, token: int) -> str:
        """Take one more token; answer what may be shown now. Sets `stopped` when a stop text is complete."""
        self._ids.append(token)
        text = self._decode(self._prefix, len(self._ids))
        if text.endswith(_INCOMPLETE):  # only the last character can still change: bytes before it are decided
            piece = text[self._shown : -1]
            self._shown = max(self._shown, len(text) - 1)
        else:
            piece = text[self._shown :]
            self._prefix, self._read = self._read, len(self._ids)
            self._shown = len(self._decode(self._prefix, self._read))
        return self._release(piece)

    def finish(self) -> str:
        """The rest, when no token will follow."""
        if self.stopped:
            return ""
        rest = self._decode(self._prefix, len(self._ids))[self._shown :]
        shown = self._release(rest)
        if self.stopped:
            return shown
        self._released += len(self._held)
        return shown + self._held

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _release(self, piece: str) -> str:
        """Hold back what may be the beginning of a stop text."""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            self._released += min(found)
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - hold :]
        self._released += len(text) - hold
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes one token stands for; of tokenizers that do not work on bytes, its text alone.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
        token: its id.
    """
    name: str | None = tokenizer.id_to_token(token)
    if name is None:  # the vocabulary projection may be wider than the vocabulary
        return b""
    codes = _byte_of_character()
    if all(character in codes for character in name):
        return bytes(codes[character] for character in name)
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text.encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies spell bytes (Radford et al. 2019): printable ones as they are, others from U+0100."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
