"""What the files beside tokenizer.json may say: an allow-list, key by key.

Transformers hands every key of tokenizer_config.json and of special_tokens_map.json to the class that the first of them
names, which may be anything that transformers has, and takes other files or repositories by some of the keys.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import WeightsError, shorten
from . import files, rules
from .tokenizer_json import ADDED, FALSE, ID, TEXT, TOKEN, WHY, WORD, check_sum

# A token in the other files: its text alone, or with what tokenizer.json says of it.
_NAMED_TOKEN = rules.optional(rules.Either((ADDED, TOKEN)))
_NAMED = dict.fromkeys((f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")), _NAMED_TOKEN)
_FURTHER = rules.Either((rules.NULL, rules.List(_NAMED_TOKEN, 2**15), rules.Named(WORD, _NAMED_TOKEN, 2**15)))
_SPECIAL = {**_NAMED, "additional_special_tokens": _FURTHER, "extra_special_tokens": _FURTHER}
_SWITCH = rules.optional(rules.FLAG)
# Transformers takes any name that it has itself, also that of something that is no tokenizer.
_CLASSES = ("CodeGenTokenizer", "GPT2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizer", "Qwen2Tokenizer")


def _names_code(value: Any) -> bool:
    """Whether it is Python code's name, or a list of two of them, of which one may be null."""
    names = value if isinstance(value, list) and len(value) == 2 else [value]
    return any(names) and all(isinstance(name, str) for name in names if name is not None)


_TEMPLATE = rules.Object({"name": TEXT, "template": TEXT}, ("name", "template"))
_CONFIG: Mapping[str, Any] = {
    **_SPECIAL,
    "tokenizer_class": rules.Rule(
        f"TokenizersBackend, {', '.join(_CLASSES)}, or one of these with Fast behind it",
        lambda name: isinstance(name, str) and name.removesuffix("Fast") in ("TokenizersBackend", *_CLASSES),
    ),
    "added_tokens_decoder": rules.Named(
        rules.Rule("an id", lambda name: re.fullmatch("[0-9]{1,7}", name, re.ASCII) is not None), TOKEN, 2**15
    ),
    "chat_template": rules.Either((rules.NULL, TEXT, rules.List(_TEMPLATE, 100), rules.Named(TEXT, TEXT, 100))),
    **dict.fromkeys(
        (
            "add_bos_token",
            "add_eos_token",
            "add_prefix_space",
            "clean_up_tokenization_spaces",
            "is_local",
            "legacy",
            "local_files_only",
            "return_token_type_ids",
            "spaces_between_special_tokens",
            "split_special_tokens",
            "use_default_system_prompt",
            "use_fast",
            "verbose",
        ),
        _SWITCH,
    ),
    # Transformers is told not to follow it.
    "auto_map": rules.Named(TEXT, rules.Rule("a name, or a list of two", _names_code), 20),
    "trust_remote_code": rules.optional(FALSE),
    "backend": rules.one_of("tokenizers"),
    "errors": rules.one_of("replace", "strict", "ignore"),
    "padding_side": rules.one_of("left", "right"),
    "truncation_side": rules.one_of("left", "right"),
    "truncation_strategy": rules.one_of("longest_first", "only_first", "only_second", "do_not_truncate"),
    "model_input_names": rules.List(rules.one_of("input_ids", "attention_mask", "token_type_ids"), 3),
    "model_max_length": rules.optional(rules.number(1, 1e31)),  # transformers writes 1e30 for none
    **dict.fromkeys(
        ("max_length", "pad_to_multiple_of", "pad_token_type_id", "stride", "vocab_size"),
        rules.optional(rules.integer(0, 2**31 - 1)),
    ),
    # Transformers puts what it found itself in the place of these.
    **dict.fromkeys(("name_or_path", "special_tokens_map_file", "tokenizer_file"), rules.optional(TEXT)),
    "sp_model_kwargs": {},
}


# The files with their tables, and the bytes at which reading ends.
FILES: Mapping[str, tuple[Any, int]] = {
    "tokenizer_config.json": (_CONFIG, 4 * files.MiB),
    "special_tokens_map.json": (_SPECIAL, files.MiB),
    "added_tokens.json": (rules.Named(ADDED, ID, 2**15), 4 * files.MiB),
}


def _further(content: Mapping[str, Any]) -> Iterator[str]:
    """Tokens that transformers adds where tokenizer.json does not have them."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = content.get(key) or ()
        for token in tokens.values() if isinstance(tokens, dict) else tokens:
            yield token["content"] if isinstance(token, dict) else token or ""


def check(folder: Path, added: Mapping[str, int]) -> None:
    """Checks those of the files that are there.

    Args:
        folder: holds them.
        added: the ids of the added tokens in its tokenizer.json.

    Raises:
        WeightsError: a key is unknown or comes twice, a value is not allowed, or an added token is another one than in
            tokenizer.json; the message has the key's dotted path.
    """
    for name, (allowed, limit) in FILES.items():
        path = folder / name
        if not path.exists():
            continue
        content = files.plain(path, files.json_object(path, limit))
        files.encodable(path, content)
        rules.check(path, content, allowed, WHY)
        listed: dict[str, int] = {}
        if name == "added_tokens.json":
            listed, content = content, {}
        for number, token in content.get("added_tokens_decoder", {}).items():
            listed[token["content"]] = int(number)
        check_sum(path, [*listed, *_further(content)])
        for word, number in listed.items():
            if added.get(word) != number:
                has = f"it as {added[word]}" if word in added else "no such added token"
                raise WeightsError(
                    f"{path} has {shorten(word)} as token {number}, and tokenizer.json has {has}: copy or download "
                    "both again"
                )
