"""What a model_config may hold: a logged model's settings and its own defaults of the options."""

from collections.abc import Mapping
from typing import Any

from . import FORMAT
from .chat import TASKS
from .errors import FormatError, InvalidRequest, shorten
from .options import NAMES, Flag, OneOf, Options, Range
from .sizes import Bytes

SETTINGS: dict[str, Range | Bytes | OneOf | Flag] = {
    "context_length": Range("integer", 16),
    "threads": Range("integer", 1, 1024),
    "parallel": Range("integer", 1, 64),
    "engine": OneOf(("auto", "genai", "onnxruntime", "openvino")),
    "kv_budget": Bytes(),
    "queue_limit": Range("integer", 1),
    "queue_timeout": Range("number", 0, above=True),
    "prefix_reuse": OneOf(("exact", "all")),
    "idle_prefill": Flag(),
    "token_gap": Range("number", 0, above=True),
    "speculation": OneOf(("auto", "off")),
    "on_error": OneOf(("raise", "row")),
    "verify": OneOf(("once", "full")),
}


def default_options(config: Mapping[str, Any]) -> Options:
    """The options that a model_config sets.

    Raises:
        InvalidRequest: an option's value is not allowed.
    """
    return Options().with_values({name: config[name] for name in NAMES if name in config})


def check_config(task: str, config: Mapping[str, Any]) -> None:
    """Checks a model_config that a user wrote: options and SETTINGS.

    Raises:
        InvalidRequest: an unknown name, or a value that is not allowed for the task.
    """
    check_values(config)
    _check_defaults(task, config)


def check_values(config: Mapping[str, Any]) -> None:
    """Checks each option and each of SETTINGS by itself, for whatever task.

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
    default_options(config)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a logged model's model_config, which may have been changed when the model was loaded.

    Raises:
        FormatError: this runtime cannot read the model.
        InvalidRequest: a setting is not allowed.
    """
    if config.get("format") != FORMAT:
        raise FormatError(
            f"the model has format {config.get('format')}, and this process runs a runtime that reads format "
            f"{FORMAT}; load it in a process of its own, or with the version of phi3_mlflow that logged it"
        )
    task = config.get("task", TASKS[0])
    if task not in TASKS:
        raise FormatError(f"the model's task is {task!r}; it must be one of {', '.join(TASKS)}")
    for name, kind, words in (("name", str, "text"), ("template", bool, "true or false")):
        if not isinstance(config.get(name, kind()), kind):
            raise InvalidRequest(name, f"is {shorten(config[name])}; it must be {words}")
    _check_defaults(task, config)
    return {name: spec.check(name, config[name]) for name, spec in SETTINGS.items() if config.get(name) is not None}


def _check_defaults(task: str, config: Mapping[str, Any]) -> None:
    """Refuses defaults that a request for the task could not be answered with, or not change back."""
    if task != "flat":
        if config.get("response_format") is not None:
            problem = "cannot be a default: a request could not ask for text any more; set it in the requests"
            raise InvalidRequest("response_format", problem)
        return
    if config.get("n") not in (None, 1):
        raise InvalidRequest("n", f"is {config['n']}; it must be 1 for the flat task, whose answer is one string")
    if config.get("logprobs"):
        raise InvalidRequest("logprobs", "is true, and the flat task's answer is one string; leave it out")


def check_batching(config: Mapping[str, Any]) -> None:
    """Checks together what only the ONNX builder's models can do.

    Raises:
        InvalidRequest: one setting needs another one.
    """
    if config.get("kv_budget") is not None and config.get("parallel") in (None, 1):
        raise InvalidRequest("kv_budget", "is given, and it needs `parallel` above 1; set that too, or leave it out")
    if config.get("engine") == "genai" and config.get("parallel") not in (None, 1):
        problem = f"is 'genai', which answers one request at a time, and `parallel` is {config['parallel']}"
        raise InvalidRequest("engine", f"{problem}; leave one of them out")
    if config.get("token_gap") is not None and config.get("engine") in ("genai", "onnxruntime"):
        problem = f"is given, and {config['engine']} reads no prompts in one step with answers; openvino does"
        raise InvalidRequest("token_gap", f"{problem}: set `engine` to that, or leave this out")


def refuse_batching(config: Mapping[str, Any]) -> None:
    """Checks that a model_config asks for nothing that only the ONNX builder's models can do.

    Raises:
        InvalidRequest: it does.
    """
    for name, harmless in (("parallel", 1), ("kv_budget", None), ("engine", "auto"), ("token_gap", None)):
        if config.get(name) not in (None, harmless):
            problem = f"is {shorten(config[name])}, and a transformers model answers one request at a time"
            raise InvalidRequest(name, f"{problem}; leave it out, or use the ONNX builder")
