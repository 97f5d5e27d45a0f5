"""Text and chat messages <-> token ids of one tokenizer: chat template, control tokens by id, incremental decoding.

Knows `tokenizer.json`, `tokenizer_config.json` and the chat template that came with the weights, and no model.
Text that a caller wrote is encoded without any control token; those come from the template alone, by id.
"""

import codecs
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer

from .errors import InvalidRequest, WeightsError
from .templates import ChatTemplate, token_text

ROLES = ("system", "user", "assistant")

# Unicode's White_Space property: what the tokenizers library strips beside a token with lstrip or rstrip.
# (Python's own str.strip() also takes U+001C to U+001F.)
_WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a" + (
    "\u2028\u2029\u202f\u205f\u3000"
)
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Layouts of longer conversations are not kept: a cache of them would hold hundreds of megabytes.
_CACHED_ROLES = 64
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")
# Characters that take about a millisecond to encode.
_LONG = 2000
_MOST_IDS = 2**20  # one place in memory for each
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


class Tokens:
    """One tokenizer with its chat template.

    Args:
        tokenizer_json: the text of `tokenizer.json` (SentencePiece-style BPE with byte fallback, as Phi-3's).
        config: `tokenizer_config.json`, parsed.
        chat_template: the Jinja template, where it is not in `config`.

    Attributes:
        chat_template: the Jinja template.
        named: the texts of those control tokens that `config` gives a part, by its names for them.

    Raises:
        WeightsError: the tokenizer is of another kind, or its chat template cannot be used.
    """

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any], chat_template: str | None = None):
        parsed = json.loads(tokenizer_json)
        self.tokenizer_json = tokenizer_json
        self._added = {token["content"]: token for token in parsed["added_tokens"]}
        for token in config.get("added_tokens_decoder", {}).values():  # wins over tokenizer.json, as in transformers
            if (name := token["content"]) in self._added:
                self._added[name] = {**self._added[name], "lstrip": token["lstrip"], "rstrip": token["rstrip"]}
        self._names = {token["id"]: name.encode() for name, token in self._added.items()}
        self._added_pattern = re.compile("|".join(re.escape(t) for t in sorted(self._added, key=len, reverse=True)))
        self._bos = _prefix_ids(tokenizer_json, config, self._added)
        self._first, self._inner = _plain_tokenizers(parsed)
        self._pieces, self._strip = _decoder_table(parsed)
        self.longest_piece = max(map(len, self._pieces))  # UTF-8 bytes that one token can stand for
        self.chat_template = chat_template or config.get("chat_template")
        self.named = {name: token_text(config[name]) for name in _NAMED if config.get(name)}
        self._template = ChatTemplate(self.chat_template, config)
        self._layout = lru_cache(maxsize=256)(self._split_template)
        try:
            self._layout(("user",))
        except InvalidRequest as error:
            raise WeightsError(f"the tokenizer's chat template cannot express a user's message: {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokens":
        """Reads the tokenizer in a weights folder (`chat_template.jinja` beside it wins over the config's)."""
        try:
            tokenizer_json = (folder / "tokenizer.json").read_text("utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
            template = folder / "chat_template.jinja"
            return cls(tokenizer_json, config, template.read_text("utf-8") if template.exists() else None)
        except WeightsError:
            raise
        except Exception as error:  # the library tokenizers raises no more special ones
            problem = str(error) if isinstance(error, OSError | ValueError) else repr(error)
            raise WeightsError(f"the tokenizer in {folder} cannot be read: {problem}") from error

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id; logits beyond it are padding of the weights and belong to no token."""
        return len(self._pieces)

    @property
    def control(self) -> dict[str, int]:
        """Ids of the control tokens by their text."""
        return {text: token["id"] for text, token in self._added.items()}

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt for the next assistant message.

        Args:
            messages: each with `role` (one of ROLES) and `content`.

        Returns:
            The ids that transformers' `apply_chat_template(messages, add_generation_prompt=True)` gives for text
            without control tokens; for any text, just the template's own control tokens and no other.

        Raises:
            InvalidRequest: the template cannot express these roles in this order.
        """
        roles = tuple(message["role"] for message in messages)
        parts = self._layout(roles) if len(roles) <= _CACHED_ROLES else self._split_template(roles)
        runs: list[int | str] = []
        for part in parts:
            # An int stands for a control token; a tuple holds the index of the message whose content goes there.
            piece = messages[part[0]]["content"] if isinstance(part, tuple) else part
            if isinstance(piece, str) and runs and isinstance(runs[-1], str):
                runs[-1] += piece
            else:
                runs.append(piece)
        return self._encode_runs(runs)

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
        specs = {token["id"]: token for token in self._added.values()}
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

    def _split_template(self, roles: tuple[str, ...]) -> list[int | str | tuple[int]]:
        turns = [(role, f"\ue000{i}\ue001") for i, role in enumerate(roles)]
        try:
            rendered = self._template.render(turns)
        except jinja2.TemplateError as error:
            wrong = bisect_left(range(len(roles) - 1), True, key=lambda i: self._template.refuses(turns[: i + 1]))
            raise _inexpressible(roles, wrong, f"; it says: {error}") from error
        parts: list[int | str | tuple[int]] = []
        position = 0
        for match in re.finditer(f"{_PLACEHOLDER.pattern}|{self._added_pattern.pattern}", rendered):
            if match.start() > position:
                parts.append(rendered[position : match.start()])
            parts.append((int(match[1]),) if match[1] else self._added[match[0]]["id"])
            position = match.end()
        if position < len(rendered):
            parts.append(rendered[position:])
        self._check_layout(roles, parts)
        return parts

    def _check_layout(self, roles: tuple[str, ...], parts: Sequence[int | str | tuple[int]]) -> None:
        """Every message must appear once, in order, and directly behind its own role's token."""
        by_id = {self._added[f"<|{role}|>"]["id"]: role for role in ROLES if f"<|{role}|>" in self._added}
        opened: list[str] = []
        filled: list[tuple[str, int, int]] = []  # role, message, how many were opened until then
        for part in parts:
            if isinstance(part, int) and part in by_id:
                opened.append(by_id[part])
            elif isinstance(part, tuple):
                filled.append((opened[-1] if opened else "", part[0], len(opened)))
        expected = [(role, index, index + 1) for index, role in enumerate(roles)]
        if filled == expected and opened == [*roles, "assistant"]:
            return
        wrong = next((i for i, (a, b) in enumerate(zip(filled, expected, strict=False)) if a != b), len(filled))
        raise _inexpressible(roles, min(wrong, len(roles) - 1))


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
        piece, self._stripped = self._pieces[token], self._strip
        held = self._utf8.getstate()[0]
        self.carried = _carried(held, piece) if held and piece else 0
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


def _inexpressible(roles: Sequence[str], wrong: int, reason: str = "") -> InvalidRequest:
    return InvalidRequest(
        f"messages[{wrong}].role",
        f"is {roles[wrong]!r}, and this model's chat template cannot express that there (roles up to it: "
        f"{', '.join(roles[max(0, wrong - 9) : wrong + 1])}{reason}); use user and assistant in turn, beginning and "
        "ending with user",
    )


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    if len(text) > _LONG:  # `encode` holds Python's lock, which others wait for
        return tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return tokenizer.encode(text, add_special_tokens=False).ids


def _prefix_ids(tokenizer_json: str, config: Mapping[str, Any], added: Mapping[str, Any]) -> list[int]:
    """What the tokenizer puts before plain text. `add_bos_token` wins over the post-processor, as in transformers."""
    if (add := config.get("add_bos_token")) is not None:
        return [added[token_text(config["bos_token"])]["id"]] if add else []
    whole = Tokenizer.from_str(tokenizer_json)
    bare = whole.encode("a", add_special_tokens=False).ids
    full = whole.encode("a").ids
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]


def _plain_tokenizers(parsed: Mapping[str, Any]) -> tuple[Tokenizer, Tokenizer]:
    """Tokenizers without any added token, for the first run of a prompt and for the others.

    Dropping the added tokens also covers `</s>`, which Phi-3 does not mark as special and which would otherwise be
    parsed. The two differ where the space before the first word is put at the beginning of the prompt alone.
    """
    plain = {**parsed, "added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    pre_tokenizer = parsed.get("pre_tokenizer") or {}
    first = inner = Tokenizer.from_str(json.dumps(plain))
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        inner = Tokenizer.from_str(json.dumps({**plain, "pre_tokenizer": {**pre_tokenizer, "prepend_scheme": "never"}}))
    return first, inner


def _decoder_table(parsed: Mapping[str, Any]) -> tuple[list[bytes], int]:
    """The bytes of each token id, and how many spaces are stripped from the beginning of a text."""
    steps = (parsed.get("decoder") or {}).get("decoders", [])
    if parsed["model"]["type"] != "BPE" or not any(step["type"] == "ByteFallback" for step in steps):
        raise WeightsError("tokenizer.json is not a BPE tokenizer with byte fallback, as Phi-3's is")
    vocab = parsed["model"]["vocab"]
    added = {token["id"] for token in parsed["added_tokens"]}
    ids = [*vocab.values(), *added]
    if not 0 <= min(ids) <= max(ids) < _MOST_IDS:
        raise WeightsError(
            f"tokenizer.json has ids from {min(ids)} to {max(ids)}: they must be from 0 to {_MOST_IDS - 1}"
        )
    pieces = [b""] * (max(ids) + 1)
    for piece, token in vocab.items():
        if token not in added:
            byte = _BYTE_PIECE.fullmatch(piece)
            pieces[token] = bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()
    return pieces, sum(step["start"] for step in steps if step["type"] == "Strip")
