"""How a record becomes token ids: once, for training, evaluation and serving alike.

The tokenizer's own chat template decides the form. Text that comes from outside is never read as control
tokens: a prompt that spells out `<|im_end|>` stays text, so nobody can end their turn and be the system.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from learner.errors import BaseModelError

# Private-use characters: no template holds them, so what stands around a message can be cut out exactly.
_MARK = "\ue000{}\ue001"
_MARK_RE = r"\ue000(\d+)\ue001"
# Contents on which cutting the template open must equal applying it. A template that trims fails here.
_PROBES = ("hi", " two  words \n", "\n\nu\u0308 <b>\t", "")


@dataclass(frozen=True)
class _Slot:
    """Where the content of message `index` goes in a rendered template."""

    index: int


class Renderer:
    """Renders prompts and completions as token ids with one tokenizer and one optional system prompt.

    Args:
        tokenizer: a fast transformers tokenizer with a chat template.
        system: the system prompt; None leaves it to the template (Qwen2.5's has a default of its own).

    Raises:
        BaseModelError: no chat template, no end-of-turn token, or a template that drops or repeats messages.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise BaseModelError(
                "tokenizer.chat_template=None: must be set; use an instruct model, or add chat_template.jinja"
            )
        self.tokenizer = tokenizer
        self.system = system
        specials = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._specials: dict[str, int] = specials
        by_length = sorted(specials, key=len, reverse=True)
        self._special_re = re.compile("|".join(map(re.escape, by_length)) if specials else r"(?!)")
        self._skeletons: dict[tuple[str, ...], tuple[_Slot | int | str, ...]] = {}
        self.end_id: int = self._end_of_turn()
        # False: the template rewrites contents. It is applied as it is, to text without control tokens.
        self._open = all(
            self._fill(probe_messages) == self._apply(probe_messages)
            for probe_messages in (self._with_system([{"role": "user", "content": p}]) for p in _PROBES)
        )

    def prompt_ids(self, prompt: str) -> list[int]:
        """The ids of one user turn, ending where the assistant begins to speak."""
        return self.conversation_ids([{"role": "user", "content": prompt}])

    def completion_ids(self, text: str) -> list[int]:
        """The ids an assistant would have to say for `text`, with the end-of-turn token last."""
        return [*self._text_ids(text), self.end_id]

    def example(self, prompt: str, completion: str) -> tuple[list[int], int]:
        """Token ids of a whole exchange, and the index of the first completion token in them."""
        ids = self.prompt_ids(prompt)
        start = len(ids)
        return ids + self.completion_ids(completion), start

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of several turns `{role, content}`, ending where the assistant begins to speak.

        The renderer's system prompt is put first unless the messages bring their own.
        """
        full = self._with_system(messages)
        if self._open:
            return self._fill(full)
        return self._apply([{**m, "content": self._without_control(m["content"])} for m in full])

    def _with_system(self, messages: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
        if self.system is None or (messages and messages[0]["role"] == "system"):
            return list(messages)
        return [{"role": "system", "content": self.system}, *messages]

    def _text_ids(self, text: str) -> list[int]:
        """Ids of outside text: what looks like a control token is split into ordinary ones."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _apply(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The template as transformers applies it."""
        text = self._template(messages, generate=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        return ids

    def _template(self, messages: Sequence[Mapping[str, str]], *, generate: bool) -> str:
        import jinja2

        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=generate
            )
        except jinja2.TemplateError as error:
            roles = [m["role"] for m in messages]
            raise BaseModelError(
                f"chat template with roles={roles}: refused ({error}); "
                "leave out the system prompt or alternate the turns"
            ) from error
        return text

    def _fill(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Put contents into the opened template. Text between control tokens is tokenised in one piece."""
        ids: list[int] = []
        text = ""
        for piece in self._skeleton(tuple(m["role"] for m in messages)):
            if isinstance(piece, int):
                ids += self._text_ids(text) if text else []
                ids.append(piece)
                text = ""
            else:
                text += messages[piece.index]["content"] if isinstance(piece, _Slot) else piece
        return ids + (self._text_ids(text) if text else [])

    def _skeleton(self, roles: tuple[str, ...]) -> tuple[_Slot | int | str, ...]:
        """The template around these roles: control token ids, literal text and slots for contents."""
        if roles in self._skeletons:
            return self._skeletons[roles]
        marked = [{"role": role, "content": _MARK.format(i)} for i, role in enumerate(roles)]
        parts = re.split(f"{_MARK_RE}|({self._special_re.pattern})", self._template(marked, generate=True))
        pieces: list[_Slot | int | str] = []
        for literal, mark, special in zip(parts[::3], [*parts[1::3], None], [*parts[2::3], None], strict=True):
            if literal:
                pieces.append(literal)
            if mark is not None:
                pieces.append(_Slot(int(mark)))
            elif special is not None:
                pieces.append(self._specials[special])
        slots = [piece.index for piece in pieces if isinstance(piece, _Slot)]
        if slots != list(range(len(roles))):
            raise BaseModelError(
                f"chat template with roles={list(roles)}: renders messages {slots}, must render each once; "
                "fix the template or leave out the system prompt"
            )
        skeleton = tuple(pieces)
        if len(roles) <= len(("system", "user")):  # a bound: conversations of any length must not fill memory
            self._skeletons[roles] = skeleton
        return skeleton

    def _end_of_turn(self) -> int:
        """The control token the template puts behind an assistant's words, else the tokenizer's eos."""
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _MARK.format(0)}]
        behind = self._template(turns, generate=False).partition(_MARK.format(0))[2]
        found = self._special_re.search(behind)
        if found:
            return self._specials[found.group()]
        if self.tokenizer.eos_token_id is None:
            raise BaseModelError("tokenizer.eos_token=None: must be set; add it to tokenizer_config.json")
        return int(self.tokenizer.eos_token_id)

    def _without_control(self, text: str) -> str:
        """Cut control tokens out of outside text, also those that appear by cutting others."""
        while self._special_re.search(text):
            text = self._special_re.sub("", text)
        return text
