"""Text and chat messages <-> token ids of one tokenizer: control tokens by id, incremental decoding.

Knows `tokenizer.json`, `tokenizer_config.json` and the chat template that came with the weights, and no model.
Text that a caller wrote is encoded without any control token; those come from the template alone, by id.
"""

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from . import vocabulary
from .calls import Form
from .errors import InvalidRequest, WeightsError, shorten
from .layouts import Layouts, Place
from .templates import ChatTemplate, token_text
from .tools import Function

# Unicode's White_Space property: what the tokenizers library strips beside a token with lstrip or rstrip.
# (Python's own str.strip() also takes U+001C to U+001F.)
_WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a" + (
    "\u2028\u2029\u202f\u205f\u3000"
)
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# The system message of Phi-4-mini's model card, for conversations with tools that have none.
_WITH_TOOLS = "You are a helpful assistant with some tools."
# Characters that take about a millisecond to encode.
_LONG = 2000


class Tokens:
    """One tokenizer with its chat template.

    Args:
        tokenizer_json: the text of `tokenizer.json`, which `trust.check_tokenizer` lets pass.
        config: `tokenizer_config.json`, parsed.
        chat_template: the Jinja template, where it is not in `config`.
        template: whether there has to be one that can be used. Otherwise chats are refused where there is none.

    Attributes:
        longest_piece: UTF-8 bytes of text that one token can stand for, at most.
        problem: why there are no chats; None where there are.
        chat_template: the Jinja template, which may be one that cannot be used.
        calls: how the model writes calls of tools; None where its template takes none.
        named: the texts of those control tokens that `config` gives a part, by its names for them.

    Raises:
        WeightsError: its chat template cannot be used, or it begins with a token that it does not have.
    """

    def __init__(
        self,
        tokenizer_json: str,
        config: Mapping[str, Any],
        chat_template: str | None = None,
        *,
        template: bool = True,
    ):
        parsed = json.loads(tokenizer_json)
        self.tokenizer_json = tokenizer_json
        found = vocabulary.read(parsed)
        self._first, self._inner, self._strip = found.first, found.inner, found.strip
        self.longest_piece = found.longest_piece
        self._control = dict(found.control)
        for token in config.get("added_tokens_decoder", {}).values():  # wins over tokenizer.json, as in transformers
            if (name := token["content"]) in self._control:
                listed = {key: token[key] for key in ("lstrip", "rstrip", "special") if key in token}
                self._control[name] = {**self._control[name], **listed}
        self._names = {token["id"]: name.encode() for name, token in self._control.items()}
        # An answer shows the others, such as `<think>`. As in transformers, a token with a use of its own is not shown.
        listed_tokens = (token for key, token in config.items() if key.endswith("_token") and token)
        used = {token_text(token) for token in listed_tokens if not isinstance(token, bool)}
        shown = {t["id"]: self._names[t["id"]] for n, t in self._control.items() if not (t["special"] or n in used)}
        self._pieces = [shown.get(token, piece) for token, piece in enumerate(found.pieces)]
        self._bos = _prefix_ids(parsed, config, self.control)
        self.chat_template = chat_template or config.get("chat_template")
        self.named = {name: token_text(config[name]) for name in _NAMED if config.get(name)}
        self._layouts: Layouts | None = None
        self.problem: str | None = None
        try:
            self._layouts = Layouts(ChatTemplate(self.chat_template, config), self.control)
        except WeightsError as error:
            if template:
                raise
            self.problem = str(error)
        takes_tools = self._layouts is not None and self._layouts.tools is not None
        self.calls = Form.of(self.control) if takes_tools else None

    @classmethod
    def from_folder(cls, folder: Path, *, template: bool = True, chat_template: str | None = None) -> "Tokens":
        """Reads the tokenizer in a weights folder (`chat_template.jinja` beside it wins over the config's).

        Args:
            folder: holds tokenizer.json and tokenizer_config.json.
            template: see Tokens.
            chat_template: takes the place of the folder's.
        """
        try:
            tokenizer_json = (folder / "tokenizer.json").read_text("utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            file = folder / "chat_template.jinja"
            if chat_template is None and file.exists():
                chat_template = file.read_text("utf-8")
            return cls(tokenizer_json, config, chat_template, template=template)
        except WeightsError:
            raise
        # The library tokenizers raises no more special ones, and one of pyo3 that is no Exception where it fails.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            plain = isinstance(error, OSError | ValueError) or type(error) is Exception
            problem = " ".join((str(error) if plain else repr(error)).split())[:300]
            raise WeightsError(f"the tokenizer in {folder} cannot be read: {problem}") from error

    @property
    def marked(self) -> bool:
        """Whether control tokens mark a chat's turns, which no user's text can imitate."""
        return self._layouts is not None and self._layouts.marked

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; logits beyond it are padding of the weights and belong to no token."""
        return len(self._pieces)

    @property
    def control(self) -> dict[str, int]:
        """Ids of the control tokens by their text."""
        return {text: token["id"] for text, token in self._control.items()}

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function] = ()) -> list[int]:
        """The prompt for the next assistant message.

        Args:
            messages: each with `role` (one of `layouts.ROLES`, or `tool`), `content`, and `calls` where it made some.
            functions: what the model is told that it may call, where `calls` is not None.

        Returns:
            The ids that transformers' `apply_chat_template(messages, add_generation_prompt=True)` gives for text
            without control tokens; for any text, just the template's own control tokens and no other.

        Raises:
            InvalidRequest: the template cannot express these roles in this order, or there is none.
        """
        if self._layouts is None:
            raise InvalidRequest("messages", f"is given, and this model answers no chats: {self.problem}")
        tools = None
        if functions:
            in_system = self._layouts.tools == "system"
            told = [each.as_told() for each in functions]
            wrapped = told if in_system else [{"type": "function", "function": each} for each in told]
            tools = json.dumps(wrapped, ensure_ascii=False)
            if in_system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": _WITH_TOOLS}, *messages]
        contents = [self._content(message) for message in messages]
        contents += [] if tools is None else [[tools]]
        runs: list[int | str] = []
        for part in self._layouts.layout(tuple(message["role"] for message in messages), tools):
            for piece in part.fill(contents) if isinstance(part, Place) else [part]:
                if isinstance(piece, str) and runs and isinstance(runs[-1], str):
                    runs[-1] += piece
                else:
                    runs.append(piece)
        return self._encode_runs(runs)

    def _content(self, message: Mapping[str, Any]) -> list[int | str]:
        calls = message.get("calls", ())
        if not calls:
            return [message["content"]]
        assert self.calls is not None
        written = self.calls.written([(call.name, call.arguments) for call in calls])
        text = message["content"]
        return [text + "\n" * (not self.calls.listed), *written] if text else written

    def encode_text(self, prompt: str, *, bos: bool = True) -> list[int]:
        """The prompt as it is, without a template.

        Args:
            prompt: text, in which control tokens are text too.
            bos: whether it begins with what the tokenizer puts before plain text.
        """
        return self._bos * bos + _ids(self._first, prompt)

    def decode(self, ids: Iterable[int], *, strip: bool = True) -> str:
        """Ids to text, control tokens left out.

        Args:
            ids: token ids of an answer.
            strip: drop the one space that the tokenizer puts before the first word.
        """
        decoder = self.decoder(strip=strip)
        return "".join(map(decoder.step, ids)) + decoder.flush()

    def decoder(self, *, strip: bool = True) -> "TextDecoder":
        """An incremental decoder for one answer."""
        return TextDecoder(self._pieces, self._names, self._strip if strip else 0)

    def _encode_runs(self, runs: Sequence[int | str]) -> list[int]:
        specs = {token["id"]: token for token in self._control.values()}
        ids: list[int] = []
        for index, run in enumerate(runs):
            if isinstance(run, int):
                ids.append(run)
                continue
            before, after = runs[index - 1 : index], runs[index + 1 : index + 2]
            text = run
            if before and specs[before[0]]["rstrip"]:  # type: ignore[index]
                text = text.lstrip(_WHITE_SPACE)
            if after and specs[after[0]]["lstrip"]:  # type: ignore[index]
                text = text.rstrip(_WHITE_SPACE)
            if text:
                ids += _ids(self._inner if index else self._first, text)
        return ids


class TextDecoder:
    """Token ids of one answer to text, one by one. Half of a character is held back until the rest arrives.

    Attributes:
        carried: how many characters of what the last step gave stand for bytes of earlier tokens alone.
    """

    def __init__(self, pieces: Sequence[bytes], names: Mapping[int, bytes], strip: int):
        self.carried = 0
        self._pieces = pieces
        self._names = names
        self._strip = self._stripped = strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def piece(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for, part of a character maybe; for a control token its name."""
        return self._pieces[token] or self._names.get(token, b"")

    def shown(self, token: int) -> bytes:
        """What `piece` is in the place of the last step: without the spaces that a text loses at its beginning."""
        piece = self.piece(token)
        return piece[min(self._stripped, len(piece) - len(piece.lstrip(b" "))) :]

    def step(self, token: int) -> str:
        """The text that this token completes, often a word, sometimes nothing."""
        piece = self._pieces[token]
        held = self._utf8.getstate()[0]
        self.carried = _carried(held, piece) if held and piece else 0
        self._stripped = 0 if self.carried else self._strip
        return self._trim(self._utf8.decode(piece))

    def flush(self) -> str:
        """What is held back when the answer ends: U+FFFD for bytes that never became a character."""
        return self._trim(self._utf8.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if not text or not self._strip:
            return text
        spaces = min(self._strip, len(text) - len(text.lstrip(" ")))
        self._strip = 0 if spaces < len(text) else self._strip - spaces
        return text[spaces:]


def _carried(held: bytes, piece: bytes) -> int:
    """How many characters the bytes held back stand for alone; 0 where the next byte goes on with them."""
    alone = len(held.decode("utf-8", "replace"))
    return alone if len((held + piece[:1]).decode("utf-8", "replace")) > alone else 0


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    if len(text) > _LONG:  # `encode` holds Python's lock, which others wait for
        return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return tokenizer.encode(text, add_special_tokens=False).ids


def _prefix_ids(parsed: Mapping[str, Any], config: Mapping[str, Any], control: Mapping[str, int]) -> list[int]:
    """What the tokenizer puts before plain text. `add_bos_token` wins over the post-processor, as in transformers."""
    add = config.get("add_bos_token")
    if add is None:
        return vocabulary.prefix(parsed)
    name = token_text(config.get("bos_token")) if add else ""
    if add and name not in control:
        raise WeightsError(
            f"tokenizer_config.json has add_bos_token true and bos_token {shorten(name)}, which tokenizer.json does "
            "not have as an added token: copy or download both again"
        )
    return [control[name]] if add else []
