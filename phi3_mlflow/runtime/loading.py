"""A folder of weights -> a service. Knows decoders and settings; nothing of MLflow's calls."""

import importlib.util
import logging
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import FORMAT, manifest, pretrained, trust
from .chat import TASKS
from .decoders.base import CannotBatch, Decoder, Part
from .decoders.longrope import Switching, switch_in, switch_of
from .decoders.processor import has_vnni
from .errors import InvalidRequest, WeightsError
from .service import Service
from .settings import check_batching, check_config, default_options, refuse_batching, settings_of
from .steps import TOKEN_GAP
from .tokens import Tokens

if TYPE_CHECKING:
    import transformers

_logger = logging.getLogger(__name__)

# How many requests may wait where the model_config does not say.
DEFAULT_QUEUE_LIMIT = 64
# Seconds without work after which answers are prefilled again.
_RENEW_AFTER = 1.0
# A token that every vocabulary has.
_TRIED = 5


def load(folder: Path, **config: Any) -> Service:
    """Loads an onnxruntime-genai folder that no model was logged from, so that there is no manifest to check.

    Args:
        folder: the weights.
        config: defaults of options, and what `settings` lists.

    Raises:
        WeightsError: a file is missing or damaged.
        InvalidRequest: a setting is not allowed.
    """
    task = config.get("task", TASKS[0])
    check_config(task, {name: value for name, value in config.items() if name not in ("task", "name", "template")})
    return _onnx(folder, {"format": FORMAT, **config})


def load_onnx(folder: Path, config: Mapping[str, Any], snapshot: Path | None = None) -> Service:
    """Checks and loads an onnxruntime-genai folder.

    Args:
        folder: the weights, with their manifest.
        config: the model_config: defaults of options, and what `settings` lists.
        snapshot: the folder of the hub's cache with the weights, where `folder` has their manifest alone.

    Raises:
        FormatError, WeightsError: this runtime cannot read the model, or a file is missing or damaged.
        InvalidRequest: a setting is not allowed.
    """
    settings = settings_of(config)  # before gigabytes are hashed
    manifest.verify(folder, full=settings.get("verify") == "full", files=snapshot)
    return _onnx(snapshot or folder, config, manifest.sizes(folder) if snapshot else None)


def _onnx(folder: Path, config: Mapping[str, Any], names: Collection[str] | None = None) -> Service:
    settings = settings_of(config)
    check_batching(config)
    trust.check(folder, names)
    arguments = _arguments(settings, config)  # what may be wrong with them is told before the weights are loaded
    tokens = Tokens.from_folder(folder, template=arguments["template"])
    return Service(tokens, _warmed(onnx_decoder(folder, settings)), **arguments)


def pipeline_in(folder: Path, device: int | None = None) -> "transformers.TextGenerationPipeline":
    """Transformers' own pipeline for a folder of weights that `trust` has checked.

    Args:
        folder: holds the model and the tokenizer.
        device: the number of a GPU, or -1 for the processor; None for what transformers takes.

    Raises:
        WeightsError: tensors are missing or do not fit, or transformers refuses the files.
    """
    import transformers

    pretrained.check(folder)
    model = pretrained.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)


def load_pipeline(folder: Path, pipeline: "transformers.TextGenerationPipeline", config: Mapping[str, Any]) -> Service:
    """Loads a pipeline of transformers.

    Args:
        folder: the tokenizer's.
        pipeline: its model is driven; its tokenizer and its generate() are not used.
        config: as for load_onnx.

    Raises:
        FormatError, WeightsError: this runtime cannot read the model.
        InvalidRequest: a setting is not allowed.
    """
    import torch

    from .decoders.pipeline import PipelineDecoder

    settings = settings_of(config)
    refuse_batching(config)
    arguments = _arguments(settings, config)
    if threads := settings.get("threads"):
        torch.set_num_threads(threads)
    decoder: Decoder = PipelineDecoder(pipeline, context_length=settings.get("context_length"))
    if switch := switch_in(pipeline.model.config.to_dict()):
        decoder = Switching(decoder, switch)
    return Service(Tokens.from_folder(folder, template=arguments["template"]), _warmed(decoder), **arguments)


def _arguments(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a Service is to be made with."""
    return {
        "task": config.get("task", "llm/v1/chat"),
        "name": config.get("name", "phi3"),
        "template": config.get("template", True),
        "defaults": default_options(config),
        "queue_limit": settings.get("queue_limit", DEFAULT_QUEUE_LIMIT),
        "queue_timeout": settings.get("queue_timeout"),
        "reuse": settings.get("prefix_reuse", "exact"),
        "renew_after": _RENEW_AFTER if settings.get("idle_prefill", True) else None,
        "token_gap": settings.get("token_gap", TOKEN_GAP),
        "speculation": settings.get("speculation", "auto") == "auto",
    }


def onnx_decoder(folder: Path, settings: Mapping[str, Any]) -> Decoder:
    """The decoder that the settings ask for; where it cannot run the folder, the next best with the reason in the log.

    Raises:
        WeightsError: the folder cannot be loaded.
        InvalidRequest: a setting does not fit the weights, or what it needs is not installed.
    """
    shared: dict[str, Any] = {name: settings.get(name) for name in ("context_length", "threads")}
    several = {"slots": settings.get("parallel", 1), "kv_budget": settings.get("kv_budget"), **shared}
    engine = engine_of(settings)
    if engine == "openvino":
        try:
            from .decoders.openvino import OpenVinoDecoder

            return OpenVinoDecoder(folder, quiet=not sys.stderr.isatty(), **several)
        except (CannotBatch, ImportError) as error:
            _logger.warning("OpenVINO cannot run this folder, onnxruntime does: %s", error)
        engine = "onnxruntime" if several["slots"] > 1 else "genai"
    switch = switch_of(folder)
    if switch is not None and settings.get("engine") in (None, "auto"):
        # Genai would compute a sequence anew in one call, during which no other thread of Python runs.
        engine = "onnxruntime"
    decoder = _onnxruntime(folder, engine, several) or _genai(folder, shared)
    return decoder if switch is None else Switching(decoder, switch)


def _warmed(decoder: Decoder) -> Decoder:
    """A decoder that has computed one token: memory and threads that it first takes then belong to loading.

    Raises:
        WeightsError: it cannot, and is closed.
    """
    try:
        decoder.reserve(0, 1)
        decoder.step({0: Part([_TRIED], 1)})
        decoder.rewind(0, 0)
    except BaseException as error:
        decoder.close()
        if isinstance(error, Exception):
            problem = f"{decoder.engine} has loaded the weights and cannot compute a token with them"
            raise WeightsError(f"{problem}: {' '.join(str(error).split())[:300] or repr(error)}") from error
        raise
    return decoder


def _onnxruntime(folder: Path, engine: str, several: Mapping[str, Any]) -> Decoder | None:
    if engine != "onnxruntime":
        return None
    from .decoders.batched import BatchedDecoder

    try:
        return BatchedDecoder(folder, **several)
    except CannotBatch as error:
        what = (
            "`parallel` has no effect, requests are answered one by one" if several["slots"] > 1 else "it is not used"
        )
        _logger.warning("plain onnxruntime cannot run this folder, %s: %s", what, error)
        return None


def _genai(folder: Path, shared: Mapping[str, Any]) -> Decoder:
    from .decoders.genai import GenaiDecoder

    return GenaiDecoder(folder, **shared)


def engine_of(settings: Mapping[str, Any]) -> str:
    """What the setting `engine` comes to on this machine: genai, onnxruntime or openvino.

    `auto` is onnxruntime-genai for one request at a time. For several it is OpenVINO where that is installed and the
    processor has VNNI, without which it is slower than onnxruntime (benchmarks/decoders.py).

    Raises:
        InvalidRequest: it is openvino, which is not installed.
    """
    engine: str = settings.get("engine") or "auto"
    installed = importlib.util.find_spec("openvino") is not None
    if engine == "openvino" and not installed:
        problem = "is 'openvino', and that package is not installed; install phi3-mlflow[openvino], or leave it out"
        raise InvalidRequest("engine", problem)
    if engine != "auto":
        return engine
    if settings.get("parallel", 1) == 1:
        return "genai"
    return "openvino" if installed and has_vnni() else "onnxruntime"
