"""The MLmodel file of a logged model: read as plain data, and checked before anything is done with it.

What MLflow makes of a file that somebody changed by hand is any exception of Python's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, shorten

if TYPE_CHECKING:
    from mlflow.models import Model

NAME = "MLmodel"
_MOST_BYTES = 2**20  # of a file that has some 10 KB
_MOST_DEPTH, _MOST_EVENTS, _MOST_DIGITS = 32, 20_000, 100  # it has some 5, 200 and 20
# Sections and values that are read here or by MLflow, with their types; all of them may be missing.
_KINDS: Mapping[tuple[str, ...], str] = {
    ("flavors",): "a mapping",
    ("flavors", "python_function"): "a mapping",
    ("flavors", "python_function", "config"): "a mapping",
    ("flavors", "python_function", "artifacts"): "a mapping",
    ("flavors", "python_function", "artifacts", "weights"): "a mapping",
    ("flavors", "python_function", "artifacts", "weights", "path"): "a text",
    ("flavors", "python_function", "loader_module"): "a text",
    ("flavors", "transformers"): "a mapping",
    ("metadata",): "a mapping",
    ("metadata", "task"): "a text",
    ("metadata", "weights"): "a mapping",
    ("metadata", "weights", "sha256"): "a text",
    ("metadata", "weights", "source"): "a text",
    ("metadata", "weights", "revision"): "a text",
    ("metadata", "weights", "reference"): "true or false",
    ("model_id",): "a text",
    ("signature",): "a mapping",
    ("signature", "inputs"): "a text",
    ("signature", "outputs"): "a text",
    ("signature", "params"): "a text",
    ("saved_input_example_info",): "a mapping",
}
_TYPES: Mapping[str, type] = {"a mapping": dict, "a text": str, "true or false": bool}


def read(folder: Path) -> dict[str, Any]:
    """What the file in a model's folder says.

    Raises:
        FormatError: it is missing, too large, no YAML mapping, or has a value of another type than MLflow writes; the
            message names the file and the key.
    """
    import yaml  # takes a while, and the toolkit writes manifests without it

    path = folder / NAME
    try:
        if not path.is_file():  # a pipe would never be read to its end
            raise FileNotFoundError(path)
        with path.open("rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{folder} is not a logged model: it has no {NAME} file that can be read") from error
    if len(content) > _MOST_BYTES:
        raise FormatError(f"{path} has more than {_MOST_BYTES} bytes: do not use this copy")
    try:
        if strange := _strange(content):
            raise FormatError(f"{path} has {strange}, which no logged model has: do not use this copy")
        data = yaml.safe_load(content)
    except Exception as error:  # odd tags raise errors of many kinds
        problem = " ".join(str(error).split())[:200]
        raise FormatError(f"{path} is no YAML: {problem}; copy the model again, or log it again") from error
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds {shorten(data)} and not a mapping: copy the model again, or log it again")
    for keys, kind in _KINDS.items():
        _check(path, data, keys, kind)
    for side, text in (data.get("signature") or {}).items():
        if text is not None and not _is_columns(text):
            raise FormatError(
                f"{path} has signature.{side} {shorten(text)}: it must be a JSON list of columns; copy the model "
                "again, or log it again"
            )
    return data


def load(folder: Path) -> "Model":
    """MLflow's description of the model in a folder.

    Raises:
        FormatError: as for `read`, or MLflow does not understand the file.
    """
    from mlflow.models import Model

    read(folder)
    try:
        return Model.load(str(folder / NAME))
    except Exception as error:
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(
            f"{folder / NAME} is not as MLflow writes it ({problem}): copy the model again, or log it again"
        ) from error


def _strange(content: bytes) -> str | None:
    """What would make a small file a value without end or take the parser for ever; it stops there."""
    import yaml

    depth = 0
    for count, event in enumerate(yaml.parse(content, yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            return "YAML aliases (*)"
        if depth > _MOST_DEPTH:
            return f"lists and mappings more than {_MOST_DEPTH} deep"
        if count > _MOST_EVENTS:
            return f"more than {_MOST_EVENTS} values"
        # YAML has numbers of base 60, which take the square of their length.
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _MOST_DIGITS and _may_be_number(event):
            return f"a number of more than {_MOST_DIGITS} characters"
    return None


def _may_be_number(event: Any) -> bool:
    return bool(event.tag) or (event.implicit[0] and event.value[0] in "+-.0123456789")


def _is_columns(text: Any) -> bool:
    try:
        columns = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(columns, list) and all(isinstance(column, dict) for column in columns)


def _check(path: Path, data: Any, keys: tuple[str, ...], kind: str) -> None:
    value = data
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if value is not None and not isinstance(value, _TYPES[kind]):
        raise FormatError(
            f"{path} has {'.'.join(keys)} {shorten(value)}: it must be {kind}; copy the model again, or log it again"
        )
