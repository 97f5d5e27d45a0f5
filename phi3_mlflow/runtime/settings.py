"""What a model_config may hold: a logged model's settings and its own defaults of the options."""

from collections.abc import Mapping
from typing import Any

from . import FORMAT
from .errors import FormatError, InvalidRequest, shorten
from .options import NAMES, OneOf, Options, Range
from .signatures import TASKS
from .sizes import Bytes

SETTINGS: dict[str, Range | Bytes | OneOf] = {
    "context_length": Range("integer", 16),
    "threads": Range("integer", 1, 1024),
    "parallel": Range("integer", 1, 64),
    "kv_budget": Bytes(),
    "queue_limit": Range("integer", 1),
    "queue_timeout": Range("number", 0, above=True),
    "prefix_reuse": OneOf(("exact", "all")),
}


def default_options(config: Mapping[str, Any]) -> Options:
    """The options that a model_config sets.

    Raises:
        InvalidRequest: an option's value is not allowed.
    """
    return Options().with_values({name: config[name] for name in NAMES if name in config})


def check_config(config: Mapping[str, Any]) -> None:
    """Checks a model_config that a user wrote: options and SETTINGS.

    Raises:
        InvalidRequest: an unknown name, or a value that is not allowed.
    """
    for name, value in config.items():
        if name in SETTINGS:
            if value is not None:
                SETTINGS[name].check(name, value)
        elif name not in NAMES:
            known = ", ".join([*SETTINGS, *NAMES])
            raise InvalidRequest(name, f"is not a setting of the model; the settings are {known}")
    _check_together(config)
    default_options(config)


def refuse_batching(config: Mapping[str, Any]) -> None:
    """Checks that a model_config asks for nothing that only the ONNX builder's models can do.

    Raises:
        InvalidRequest: it does.
    """
    if config.get("parallel") not in (None, 1):
        problem = f"is {shorten(config['parallel'])}, and a transformers model answers one request at a time"
        raise InvalidRequest("parallel", f"{problem}; leave it out, or use the ONNX builder")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a logged model's model_config.

    Raises:
        FormatError: this runtime cannot read the model.
        InvalidRequest: a setting is not allowed.
    """
    if config.get("format") != FORMAT:
        raise FormatError(
            f"the model has format {config.get('format')}, and this process runs a runtime that reads format "
            f"{FORMAT}; load it in a process of its own, or with the version of phi3_mlflow that logged it"
        )
    if config.get("task", TASKS[0]) not in TASKS:
        raise FormatError(f"the model's task is {config['task']!r}; it must be one of {', '.join(TASKS)}")
    _check_together(config)
    return {name: spec.check(name, config[name]) for name, spec in SETTINGS.items() if config.get(name) is not None}


def _check_together(config: Mapping[str, Any]) -> None:
    if config.get("kv_budget") is not None and config.get("parallel") in (None, 1):
        raise InvalidRequest("kv_budget", "is given, and it needs `parallel` above 1; set that too, or leave it out")
