"""What differs between kinds of tokenizers: the bytes of each token, and how text without control tokens is encoded.

Knows the two kinds of BPE that `tokenizer.json` can hold: SentencePiece-style with byte fallback, as Phi-3's, and
byte-level, as that of Phi-2, Phi-4, Llama 3 and Qwen. Knows no template.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# What the Unicode normal form C makes of a text is at most so many times shorter in UTF-8 (Hangul, three to one).
_COMPOSED = 3


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer's vocabulary.

    Attributes:
        pieces: the UTF-8 bytes that each token id stands for; none for control tokens and ids without a token.
        control: the added tokens that text never becomes, by their names, as `tokenizer.json` has them.
        strip: how many spaces are stripped from the beginning of an answer.
        longest_piece: bytes of text that one token can stand for, at most.
        first: encodes the first run of a prompt, without control tokens and BOS.
        inner: encodes the runs behind a control token.
    """

    pieces: Sequence[bytes]
    control: Mapping[str, Mapping[str, Any]]
    strip: int
    longest_piece: int
    first: Tokenizer
    inner: Tokenizer


def read(parsed: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a parsed `tokenizer.json`, which `trust.check_tokenizer` lets pass."""
    decoder = parsed["decoder"]
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    return _sentencepiece(parsed, steps) if "ByteFallback" in steps else _byte_level(parsed)


def prefix(parsed: Mapping[str, Any]) -> list[int]:
    """The ids that the post-processor of a `tokenizer.json` puts before plain text."""
    processor = parsed.get("post_processor") or {}
    ids = []
    for step in processor.get("processors", [processor]):
        pieces = step.get("single", ()) if step else ()
        for name in (piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece):
            ids += step["special_tokens"][name]["ids"]
    return ids


def _sentencepiece(parsed: Mapping[str, Any], steps: Mapping[str, Mapping[str, Any]]) -> Vocabulary:
    def piece(name: str) -> bytes:
        byte = _BYTE_PIECE.fullmatch(name)
        return bytes.fromhex(byte[1]) if byte else name.replace("\u2581", " ").encode()

    first = inner = _plain(parsed, [])
    pre_tokenizer = parsed.get("pre_tokenizer") or {}
    # Here the space before the first word is put at the beginning of the prompt alone.
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme") == "first":
        inner = _plain({**parsed, "pre_tokenizer": {**pre_tokenizer, "prepend_scheme": "never"}}, [])
    control = {token["content"]: token for token in parsed["added_tokens"]}
    pieces = _pieces(parsed, {name: piece(name) for name in parsed["model"]["vocab"]})
    strip = steps.get("Strip", {}).get("start", 0)
    return Vocabulary(pieces, control, strip, max(map(len, pieces)), first, inner)


def _byte_level(parsed: Mapping[str, Any]) -> Vocabulary:
    # Runs of spaces and tabs that came later than the vocabulary (Phi-2's) are text: they say nothing to the model
    # that the same text in other tokens would not.
    text = [token for token in parsed["added_tokens"] if token["content"].isspace()]
    control = {token["content"]: token for token in parsed["added_tokens"] if not token["content"].isspace()}
    names = {**parsed["model"]["vocab"], **{token["content"]: token["id"] for token in text}}
    pieces = _pieces(parsed, {name: _spelled(name) for name in names}, text)
    longest = max(map(len, pieces)) * (_COMPOSED if parsed.get("normalizer") else 1)
    plain = _plain(parsed, text)
    return Vocabulary(pieces, control, 0, longest, plain, plain)


def _plain(parsed: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> Tokenizer:
    """A tokenizer with no other added tokens than these.

    So it does not parse `</s>` either, which Phi-3 does not mark as special.
    """
    changed = {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    return Tokenizer.from_str(json.dumps({**parsed, **changed}))


def _pieces(
    parsed: Mapping[str, Any], spelled: Mapping[str, bytes], text: Sequence[Mapping[str, Any]] = ()
) -> list[bytes]:
    vocab = {**parsed["model"]["vocab"], **{token["content"]: token["id"] for token in text}}
    control = {token["id"] for token in parsed["added_tokens"]} - {token["id"] for token in text}
    pieces = [b""] * (1 + max([*vocab.values(), *control]))
    for name, token in vocab.items():
        if token not in control:
            pieces[token] = spelled[name]
    return pieces


def _letters() -> dict[str, int]:
    """Byte-level BPE's letter for each byte: `bytes_to_unicode` of https://github.com/openai/gpt-2 (src/encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


_LETTERS = _letters()


def _spelled(name: str) -> bytes:
    """The bytes of a byte-level token. As in the tokenizers library, a name with other letters stands for itself."""
    try:
        return bytes(map(_LETTERS.__getitem__, name))
    except KeyError:
        return name.encode()
