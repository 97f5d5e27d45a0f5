"""Calls of tools among the tokens of an answer: where they may come, what they must be, and what they say.

Knows token ids and the two forms in which models write calls; knows no sampling and no wire format.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .answers import CallPiece
from .errors import InvalidRequest
from .grammar import Grammar

# Control tokens around calls, and whether all calls of an answer are one JSON list between them: Phi-4-mini's, and
# those of Qwen and Hermes (https://github.com/NousResearch/Hermes-Function-Calling).
_MARKS = (("<|tool_call|>", "<|/tool_call|>", True), ("<tool_call>", "</tool_call>", False))
_NAME = re.compile(r'\{"name": "([^"]+)", "arguments": $')


@dataclass(frozen=True)
class Form:
    """How a model writes calls.

    Attributes:
        begin, end: the control tokens around them.
        listed: whether all calls of an answer are one JSON list between the two; else each has its own two, with line
            breaks inside and between.
    """

    begin: int
    end: int
    listed: bool

    @classmethod
    def of(cls, control: Mapping[str, int]) -> "Form | None":
        """That of a tokenizer; None where it has no such control tokens."""
        for begin, end, listed in _MARKS:
            if begin in control and end in control:
                return cls(control[begin], control[end], listed)
        return None

    def written(self, calls: Sequence[tuple[str, str]]) -> list[int | str]:
        """Calls as the model would have written them.

        Args:
            calls: names, and arguments as `json.dumps` writes them.
        """
        texts = [f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls]
        if self.listed:
            return [self.begin, f"[{', '.join(texts)}]", self.end]
        parts: list[int | str] = []
        for place, text in enumerate(texts):
            parts += ["\n"] * bool(place) + [self.begin, f"\n{text}\n", self.end]
        return parts


class Calling:
    """Where an answer that may call tools stands; has a Grammar's methods. Not shared between threads; copy it.

    Args:
        calls: what stands between the control tokens.
        form: how they are written.
        required: whether the answer has to be calls.
        parallel: whether, with a form that is not `listed`, a call may follow another.
        newlines: ids of a line break, which may stand between calls.
        eos: ids that end an answer.
    """

    def __init__(
        self,
        calls: Grammar,
        form: Form,
        *,
        required: bool,
        parallel: bool,
        newlines: Sequence[int] = (),
        eos: Sequence[int] = (),
    ):
        self._calls = calls
        self._form = form
        self._required = required
        self._repeats = parallel and not form.listed
        self._newlines = list(newlines)
        self._eos = list(eos)
        self._inside: Grammar | None = None
        self._made = 0

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """The logits with -inf for every token that may not come next; see Grammar.mask."""
        if self._inside is None:
            only = self._only()
            if only is None:
                return logits
            allowed = np.zeros(len(logits), dtype=bool)
            allowed[only] = True
        else:
            allowed = self._inside.allowed().copy()
            allowed[self._form.end] = allowed[self._eos].any()
            allowed[self._eos] = False
            if not allowed.any():
                raise InvalidRequest("tools", "ask for text that this model's tokenizer cannot spell")
        return np.where(allowed, logits, np.float32(-np.inf))

    def accept(self, token: int) -> None:
        """Takes the token that was sampled; ValueError where it is not allowed."""
        if self._inside is not None and token != self._form.end:
            self._inside.accept(token)
        elif self._inside is not None:
            if not self._inside.finished:
                raise ValueError(f"token {token} is not allowed: the calls are not complete")
            self._inside = None
            self._made += 1
        elif (only := self._only()) is not None and token not in only:
            raise ValueError(f"token {token} is not allowed where calls begin or have ended")
        elif token == self._form.begin:
            self._inside = self._calls.copy()

    def forced(self) -> list[int]:
        """The only tokens that may follow; see Grammar.forced."""
        if self._inside is None:
            only = self._only()
            return only if only is not None and len(only) == 1 else []
        return [self._form.end] if self._inside.finished else self._inside.forced()

    def following(self, tokens: Sequence[int]) -> int:
        """How many of some tokens may follow; at most as far as where calls begin or end."""
        if self._inside is not None:
            return self._inside.following(tokens)
        if self._only() is not None:
            return 0
        return next((place for place, token in enumerate(tokens) if token == self._form.begin), len(tokens))

    def copy(self) -> "Calling":
        """An independent one in the same state."""
        other = Calling.__new__(Calling)
        other.__dict__.update(self.__dict__)
        other._inside = self._inside and self._inside.copy()
        return other

    @property
    def finished(self) -> bool:
        """Whether nothing can follow but the end."""
        return bool(self._inside is None and self._made and not self._repeats)

    def _only(self) -> list[int] | None:
        """Outside of calls, the tokens of which one has to come; None where anything may."""
        if self._made:
            return [self._form.begin, *self._newlines, *self._eos]
        return [self._form.begin] if self._required else None


class CallReader:
    """Reads the calls out of an answer's text, which is held to the grammar of `Grammars.calls`."""

    def __init__(self, form: Form):
        self._form = form
        self._inside = False
        self._head = ""  # of a call, until its arguments begin
        self._depth = 0  # of brackets in the arguments; 0 outside of them
        self._string = self._escaped = False
        self._seen = 0
        self.complete = 0  # how many calls are whole

    def step(self, token: int, text: str) -> tuple[str, tuple[CallPiece, ...]]:
        """The part of a token's text that is no call, and what is new of the calls."""
        if token in (self._form.begin, self._form.end):
            self._inside = token == self._form.begin
            return "", ()
        if not self._inside:
            return ("" if self._seen else text), ()  # line breaks between calls
        pieces: list[CallPiece] = []
        arguments = ""
        for character in text:
            if self._depth:
                arguments += character
                self._read(character)
                if not self._depth:
                    pieces.append(CallPiece(self._seen - 1, None, arguments))
                    arguments = ""
                    self.complete += 1
            elif character == "{" and (found := _NAME.search(self._head)):
                pieces.append(CallPiece(self._seen, found[1], ""))
                self._seen += 1
                self._head, self._depth, arguments = "", 1, character
            else:
                self._head += character
        if arguments:
            pieces.append(CallPiece(self._seen - 1, None, arguments))
        return "", tuple(pieces)

    def _read(self, character: str) -> None:
        if self._string:
            self._string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._string = True
        else:
            self._depth += (character in "{[") - (character in "}]")
