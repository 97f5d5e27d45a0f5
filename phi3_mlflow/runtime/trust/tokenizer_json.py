"""What tokenizer.json may say: an allow-list, key by key, of what the tokenizers of the models here have.

The library tokenizers can be told to multiply text, to choose tokens at random, or to search with an expression that
comes to no end; some of its parts end the process where their data are damaged. So what is not in the tables is
refused, whatever it is.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, shorten
from . import files, rules

NAME = "tokenizer.json"

_MOST_BYTES = 64 * files.MiB  # Phi-3's has 3.6 MB
WHY = "which no tokenizer here needs: remove the key if you know where it comes from, or do not use this copy"

_MOST_IDS = 2**20  # one place in memory for each
_MOST_MERGES = 2**21
_LONGEST = 1000  # characters of a token
# Characters of an added token, and of all in a file. What finds them in a text takes 100 bytes of memory for each, and
# time that grows with it. Of Llama 3's 256 tokens the longest has 29, and all have 7,000.
_LONGEST_ADDED, _MOST_ADDED = 200, 2**18
_SPACE = "\u2581"  # that of SentencePiece
ID = rules.integer(0, _MOST_IDS - 1)


def _word(most: int) -> rules.Rule:
    return rules.Rule(f"text of 1 to {most} characters", lambda v: isinstance(v, str) and 0 < len(v) <= most)


WORD, ADDED = _word(_LONGEST), _word(_LONGEST_ADDED)
TEXT = rules.Rule("text", lambda value: isinstance(value, str))
_ANYTHING = rules.Rule("anything", lambda value: True)
FALSE = rules.Rule("false", lambda value: value is False)
_NONE_OR_EMPTY = rules.Rule("null or ''", lambda value: value is None or value == "")
_NO_DROPOUT = rules.Rule(
    "null or 0: any other makes tokens random", lambda value: value is None or (type(value) is not bool and value == 0)
)

# The expressions by which the published tokenizers cut text into words, by who published them first. No other is
# taken: the library goes back on its steps where one does not match, for ever with some, such as (a+)+$.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BEHIND_WORDS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REGEXES = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3 and Phi-4": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_BEHIND_WORDS}",
    "Qwen 2": rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_BEHIND_WORDS}",
    "Phi-4-mini": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
_REGEX = rules.Rule(
    f"exactly the published expression of {', '.join(_REGEXES)} (others are refused, since the search with some comes "
    "to no end)",
    lambda value: isinstance(value, str) and value in _REGEXES.values(),
)


def _pattern(text: str) -> rules.Object:
    return rules.Object({"String": rules.one_of(text)}, ("String",))


# The parts of a tokenizer by their places and types, each with its keys. `type` is one more in all of them.
_BYTE_LEVEL = {"add_prefix_space": rules.FLAG, "trim_offsets": rules.FLAG, "use_regex": rules.FLAG}
_REPLACED = {"pattern": _pattern(" "), "content": rules.one_of(_SPACE)}
_PIECES = rules.List(
    {
        "SpecialToken": rules.Object({"id": WORD, "type_id": rules.integer(0, 1)}, ("id", "type_id")),
        "Sequence": rules.Object({"id": rules.one_of("A", "B"), "type_id": rules.integer(0, 1)}, ("id", "type_id")),
    },
    8,
)
_PARTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "normalizer": {"NFC": {}, "Prepend": {"prepend": rules.one_of(_SPACE)}, "Replace": _REPLACED},
    "pre_tokenizer": {
        "ByteLevel": {**_BYTE_LEVEL, "add_prefix_space": FALSE},
        "Digits": {"individual_digits": rules.FLAG},
        "Metaspace": {
            "replacement": rules.one_of(_SPACE),
            "str_rep": rules.one_of(_SPACE),
            "add_prefix_space": rules.FLAG,
            "prepend_scheme": rules.one_of("first", "always", "never"),
            "split": rules.FLAG,
        },
        "Split": {
            "pattern": rules.Object({"Regex": _REGEX}, ("Regex",)),
            # As all of a text matches, these two come to the same, see `_check_parts`.
            "behavior": rules.one_of("Isolated", "Removed"),
            "invert": rules.FLAG,
        },
    },
    "post_processor": {
        "ByteLevel": _BYTE_LEVEL,
        "TemplateProcessing": {
            "single": _PIECES,
            "pair": _PIECES,
            "special_tokens": rules.Named(
                WORD,
                rules.Object(
                    {"id": WORD, "ids": rules.List(ID, 1), "tokens": rules.List(WORD, 1)}, ("id", "ids", "tokens")
                ),
                8,
            ),
        },
    },
    "decoder": {
        "ByteLevel": _BYTE_LEVEL,
        "ByteFallback": {},
        "Fuse": {},
        "Replace": {"pattern": _pattern(_SPACE), "content": rules.one_of(" ")},
        "Strip": {"content": rules.one_of(" "), "start": rules.integer(0, 1), "stop": rules.integer(0, 0)},
    },
}
# The keys that older files lack, by types. All others have to be there.
_OPTIONAL = {"ByteLevel": ("use_regex",), "Metaspace": ("str_rep", "add_prefix_space", "prepend_scheme", "split")}
_SEQUENCES = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "post_processor": "processors",
    "decoder": "decoders",
}
# The types of parts that go together, in their order, as expressions: for the tokenizers of each kind.
_KINDS = {
    "BPE with byte fallback, as Phi-3's": {
        "decoder": "Replace ByteFallback Fuse( Strip)?",
        "normalizer": "((Prepend )?Replace)?",
        "pre_tokenizer": "(Metaspace)?",
        "post_processor": "(TemplateProcessing)?",
    },
    "byte-level BPE, as Phi-2's": {
        "decoder": "ByteLevel",
        "normalizer": "(NFC)?",
        "pre_tokenizer": "((Split|Digits) ){0,4}ByteLevel",
        "post_processor": "(ByteLevel)?( ?TemplateProcessing)?",
    },
}

_FLAGS = dict.fromkeys(("lstrip", "rstrip", "normalized", "special"), rules.FLAG)
# A token that counts as a word of its own alone would be text elsewhere, and templates would lose their marks.
_TOKEN = {"content": ADDED, "single_word": FALSE, **_FLAGS}
TOKEN = rules.Object({**_TOKEN, "__type": rules.one_of("AddedToken")}, ("content",))
_SIDE = rules.one_of("Left", "Right")
_LENGTH = rules.integer(1, _MOST_IDS)
# Of tokenizer.json, without its parts.
_ALLOWED: Mapping[str, Any] = {
    "version": rules.one_of("1.0"),
    # Of these two, which tokenizers of fine-tuned models often have, no use is made.
    "truncation": rules.optional(
        {
            "direction": _SIDE,
            "max_length": _LENGTH,
            "strategy": rules.one_of("LongestFirst", "OnlyFirst", "OnlySecond"),
            "stride": rules.integer(0, _MOST_IDS),
        }
    ),
    "padding": rules.optional(
        {
            "strategy": rules.Either((rules.one_of("BatchLongest"), {"Fixed": _LENGTH})),
            "direction": _SIDE,
            "pad_to_multiple_of": rules.optional(_LENGTH),
            "pad_id": ID,
            "pad_type_id": rules.integer(0, 255),
            "pad_token": WORD,
        }
    ),
    "added_tokens": rules.List(rules.Object({"id": ID, **_TOKEN}, ("id", *_TOKEN)), 2**15),
    "model": {
        "type": rules.one_of("BPE"),
        "dropout": _NO_DROPOUT,
        "unk_token": rules.optional(WORD),
        "continuing_subword_prefix": _NONE_OR_EMPTY,
        "end_of_word_suffix": _NONE_OR_EMPTY,
        "fuse_unk": rules.FLAG,
        "byte_fallback": rules.FLAG,
        "ignore_merges": rules.FLAG,
        # Their contents are looked at in `_check_model`, which is faster.
        "vocab": rules.Rule("an object of texts and ids", lambda value: isinstance(value, dict)),
        "merges": rules.Rule("a list of pairs", lambda value: isinstance(value, list)),
    },
}
_REQUIRED = ("version", "added_tokens", "decoder", "model.type", "model.vocab", "model.merges")


def check(folder: Path) -> tuple[dict[str, int], int]:
    """Checks the tokenizer.json in a folder.

    Returns:
        The ids of its added tokens by their names, and one more than its largest id.

    Raises:
        WeightsError: a key is unknown or comes twice, or a value is not allowed; the message has the key's dotted path.
    """
    path = folder / NAME
    content = files.plain(path, files.json_object(path, _MOST_BYTES))
    files.encodable(path, content)
    parts = {name: content.pop(name, None) for name in _PARTS}
    rules.check(path, content, _ALLOWED, WHY)
    rules.require(path, {**content, "decoder": parts["decoder"]}, _REQUIRED)
    _check_vocabulary(path, content["model"])
    added = _check_added(path, content["added_tokens"], content["model"]["vocab"])
    _check_parts(path, parts, added)
    truncation = content.get("truncation") or {}
    if truncation.get("stride", 0) >= truncation.get("max_length", 1):
        raise WeightsError(f"{path} has truncation.stride {truncation['stride']}: it must be below max_length")
    return added, 1 + max([*content["model"]["vocab"].values(), *added.values()])


def _check_vocabulary(path: Path, model: Mapping[str, Any]) -> None:
    vocab, merges = model["vocab"], model["merges"]
    if not 0 < len(vocab) <= _MOST_IDS:
        raise WeightsError(f"{path} has {len(vocab)} entries in model.vocab: they must be from 1 to {_MOST_IDS}")
    names: dict[int, str] = {}
    for name, number in vocab.items():
        if not WORD.fits(name):
            raise WeightsError(f"{path} has {shorten(name)} in model.vocab: it must be {WORD.words}")
        if not ID.fits(number):
            raise WeightsError(f"{path} has {shorten(name)} {shorten(number)} in model.vocab: it must be {ID.words}")
        if number in names:
            both = f"{shorten(names[number])} and {shorten(name)}"
            raise WeightsError(f"{path} has {both} in model.vocab, both with the id {number}: do not use this copy")
        names[number] = name
    if model.get("unk_token") is not None and model["unk_token"] not in vocab:
        raise WeightsError(f"{path} has model.unk_token {shorten(model['unk_token'])}: it must be in model.vocab")
    if len(merges) > _MOST_MERGES:
        raise WeightsError(f"{path} has {len(merges)} model.merges: they must be at most {_MOST_MERGES}")
    for index, merge in enumerate(merges):
        pair = merge.split(" ", 2) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or [*map(type, pair)] != [str, str]:
            raise WeightsError(
                f"{path} has model.merges[{index}] {shorten(merge)}: it must be a list of two tokens, or both with a "
                "space between them"
            )
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise WeightsError(
                f"{path} has model.merges[{index}] {shorten(merge)}: both and what they make must be in model.vocab"
            )


def _check_added(path: Path, tokens: list[dict[str, Any]], vocab: Mapping[str, int]) -> dict[str, int]:
    """The ids of the added tokens by their names."""
    check_sum(path, (token["content"] for token in tokens))
    added: dict[str, int] = {}
    largest = 0
    for index, token in enumerate(tokens):
        word, number = token["content"], token["id"]
        if word in added:
            raise WeightsError(f"{path} has added_tokens[{index}].content {shorten(word)} twice: do not use this copy")
        # What the library makes of it, whatever the file says: see AddedVocabulary.add_tokens in its Rust sources.
        expected = vocab.get(word, largest + 1 if largest >= len(vocab) else len(vocab))
        if number != expected:
            raise WeightsError(
                f"{path} has added_tokens[{index}].id {number} for {shorten(word)}: it must be {expected}, since added "
                "tokens have the ids of model.vocab or, in their order, those behind it"
            )
        added[word] = number
        largest = max(largest, number)
    return added


def check_sum(path: Path, words: Iterable[str]) -> None:
    """Checks how long the added tokens of a file are together.

    Raises:
        WeightsError: they are too long.
    """
    size = sum(map(len, words))
    if size > _MOST_ADDED:
        raise WeightsError(
            f"{path} has added tokens of {size} characters together: they must be at most {_MOST_ADDED}; remove those "
            "that the model was not trained with"
        )


def _check_parts(path: Path, parts: Mapping[str, Any], added: Mapping[str, int]) -> None:
    found = {}
    for place, part in parts.items():
        types = []
        for where, each in _flat(path, place, part):
            kind = each.get("type")
            if not isinstance(kind, str) or kind not in _PARTS[place]:
                known = " or ".join(map(repr, _PARTS[place]))
                raise WeightsError(f"{path} has {where}.type {shorten(kind)}: it must be {known}")
            types.append(kind)
            allowed = _PARTS[place][kind]
            needed = [key for key in allowed if key not in _OPTIONAL.get(kind, ())]
            rules.check(path, each, rules.Object({"type": TEXT, **allowed}, needed), WHY, where)
            if kind == "Split" and (each.get("behavior") == "Removed") != (each.get("invert") is True):
                raise WeightsError(
                    f"{path} has {where}.behavior {shorten(each.get('behavior'))} with invert "
                    f"{shorten(each.get('invert'))}: that loses text; it must be 'Isolated' with false"
                )
            if kind == "TemplateProcessing":
                _check_template(path, where, each, added)
        found[place] = " ".join(types)
    kind = next((kind for kind, orders in _KINDS.items() if re.fullmatch(orders["decoder"], found["decoder"])), None)
    if kind is None:
        kinds = " nor ".join(_KINDS)
        raise WeightsError(f"{path} has decoder {found['decoder'] or 'null'}: it is neither {kinds}")
    for place, order in _KINDS[kind].items():
        if not re.fullmatch(order, found[place]):
            raise WeightsError(
                f"{path} has {place} {found[place] or 'null'}, which does not go with {kind}: do not use this copy"
            )


def _flat(path: Path, place: str, part: Any) -> list[tuple[str, dict[str, Any]]]:
    """The parts at one place with their dotted paths: none, one, or those of a sequence."""
    if part is None:
        return []
    rules.check(path, part, rules.Named(TEXT, _ANYTHING, 20), WHY, place)
    if part.get("type") != "Sequence":
        return [(place, part)]
    key = _SEQUENCES[place]
    rules.require(path, part, (key,), place)
    rules.check(path, part, {"type": TEXT, key: rules.List(rules.Named(TEXT, _ANYTHING, 20), 8)}, WHY, place)
    return [(f"{place}.{key}[{index}]", each) for index, each in enumerate(part[key])]


def _check_template(path: Path, where: str, part: Mapping[str, Any], added: Mapping[str, int]) -> None:
    """Checks that it puts known tokens before the text, and nothing else."""
    for name, token in part["special_tokens"].items():
        if token["ids"] != [added.get(name)]:
            raise WeightsError(
                f"{path} has {where}.special_tokens.{shorten(name)} with ids {shorten(token['ids'])}: it must be the "
                "id of that added token"
            )
    pieces = [*part["single"], *part["pair"]]
    kinds = [list(piece) for piece in part["single"]]
    if kinds != [["SpecialToken"]] * (len(kinds) - 1) + [["Sequence"]] or any(len(piece) != 1 for piece in pieces):
        problem = "it must be added tokens, and the text behind them"
        raise WeightsError(f"{path} has {where}.single {shorten(part['single'])}: {problem}")
    for piece in pieces:
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in part["special_tokens"]:
            raise WeightsError(
                f"{path} has {where} with {shorten(piece['SpecialToken']['id'])}, which is not in its special_tokens: "
                "copy or download it again"
            )
