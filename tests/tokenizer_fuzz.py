"""Changes a tokenizer's files at random and sees that each is refused in one line or tokenizes.

Run with: python tests/tokenizer_fuzz.py SEED COUNT [FIRST]
"""

import copy
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from families import KINDS
from tokenizers import Tokenizer

from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.grammar import Grammars
from phi3_mlflow.runtime.tokens import Tokens

EMBEDDED = Path(__file__).resolve().parent.parent / "artifacts" / "onnx"
TEXT = "Hello, world! 12345  caf\u00e9\n\n\t\u4e2d\u6587 \U0001f999 <|user|> " + "a" * 40 + " " * 40 + "!?" * 20
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, 1e308, 2**20, 2**31, 2**32, 2**63, 2**64, 10**400, "", "a", "\u2581", "\ud800",
    "\x00", "a" * 2000, "(a+)+$", "BPE", "Sequence", "Fuse", "ByteLevel", "<s>", [], {}, [[]], [{}], {"a": 1},
    {"type": "Sequence"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "a" * 100}, {"Regex": "(a+)+$"},
    {"String": "a"}, {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}, {"type": "ByteLevel"},
]  # fmt: skip
KEYS = ("type", "id", "content", "vocab", "merges", "pattern", "Regex", "decoders", "dropout", "tokenizer_file", "x")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything in a JSON value; of what is long, of some."""
    yield path
    if isinstance(value, dict | list):
        keys = list(value if isinstance(value, dict) else range(len(value)))
        for key in keys if len(keys) < 40 else keys[:3] + keys[-3:]:
            yield from places(value[key], (*path, key))


def changed(rng: random.Random, content: Any) -> Any:
    """A copy with a value or two that are others, gone, new, doubled or nested."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *where, last = rng.choice([path for path in places(content) if path])
        parent = content
        for key in where:
            parent = parent[key]
        value = copy.deepcopy(rng.choice(VALUES))
        match rng.choice(("set", "set", "delete", "add", "double", "nest", "swap")):
            case "delete":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent[rng.choice((*KEYS, str(last)))] = value
            case "add" | "double" if isinstance(parent, list):
                parent.insert(last, copy.deepcopy(parent[last]) if rng.random() < 0.5 else value)
            case "nest":
                parent[last] = (
                    [parent[last]] if rng.random() < 0.5 else {"type": "Sequence", "decoders": [parent[last]]}
                )
            case "swap":
                other = rng.choice([path for path in places(content) if path])
                found = content
                for key in other:
                    found = found[key] if isinstance(found, dict | list) and len(found) else value
                parent[last] = copy.deepcopy(found)
            case _:
                parent[last] = value
    return content


def written(rng: random.Random, content: Any) -> str:
    """The text of JSON, now and then with a name that comes twice or cut off."""
    text = json.dumps(content)
    if rng.random() < 0.03:
        return text[: rng.randrange(len(text))]
    return text.replace('{"', '{"type": 5, "', 1) if rng.random() < 0.03 else text


def originals() -> Iterator[tuple[Any, Any]]:
    """Tokenizers of each kind: tokenizer.json and tokenizer_config.json."""
    yield tuple(
        json.loads((EMBEDDED / name).read_text("utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")
    )
    for kind in KINDS.values():
        with tempfile.TemporaryDirectory() as folder:
            kind.write(Path(folder))
            files = (Path(folder) / "tokenizer.json", Path(folder) / "tokenizer_config.json")
            yield tuple(json.loads(file.read_text("utf-8")) for file in files)


def tried(folder: Path) -> bool:
    """Whether the tokenizer is taken. Raises AssertionError where it is neither refused nor works."""
    try:
        trust.check_tokenizer(folder)
        ours = Tokens.from_folder(folder, template=False)
    except WeightsError as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 1000:
            raise AssertionError(str(error)) from error
        return False
    ids = ours.encode_text(TEXT)
    assert len(ids) <= 4 * len(TEXT)
    assert all(0 <= token < ours.vocab_size for token in ids), ids
    assert ours.encode_text(TEXT) == ids
    ours.decode(range(ours.vocab_size))
    Grammars(ours.tokenizer_json, ours.vocab_size, [0])
    Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT)  # as transformers does
    return True


def main(seed: int, count: int, first: int = 0) -> None:
    """Tries so many, and prints the number of each before, for a watchdog."""
    known = list(originals())
    taken = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(first, first + count):
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()
            rng = random.Random(f"{seed} {number}")
            tokenizer, config = rng.choice(known)
            if rng.random() < 0.75:
                tokenizer = changed(rng, tokenizer)
            else:
                config = changed(rng, config)
            (folder / "tokenizer.json").write_text(written(rng, tokenizer), "utf-8")
            (folder / "tokenizer_config.json").write_text(written(rng, config), "utf-8")
            taken += tried(folder)
    sys.stdout.write(f"{taken} were taken\n")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
